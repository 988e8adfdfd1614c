"""Run with a Python that has tritonclient[grpc] and not this project: python triton.py <address> <folder of PNG files>.

Prints one JSON object with what the unmodified client, blocking and asyncio, got from the server.
"""

import asyncio
import contextlib
import json
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as blocking
import tritonclient.grpc.aio as aio
from tritonclient.utils import InferenceServerException

address, folder = sys.argv[1], Path(sys.argv[2])
files = np.array([path.read_bytes() for path in sorted(folder.glob("*.png"))], object)
MODEL = "fashion_mnist"


def tensor(kind, name, array, datatype):
    made = kind.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def infer(client, kind, inputs, outputs=None, **more):
    wanted = [kind.InferRequestedOutput(name) for name in outputs] if outputs else None
    return client.infer(MODEL, inputs, outputs=wanted, **more)


def listed(result, name):
    return result.as_numpy(name).tolist()


found = {}
client = blocking.InferenceServerClient(address)
found["live"], found["ready"] = client.is_server_live(), client.is_server_ready()
found["model_ready"] = [
    client.is_model_ready(MODEL),
    client.is_model_ready("resnet"),
    client.is_model_ready(MODEL, "99"),
]
found["server"] = client.get_server_metadata(as_json=True)
found["metadata"] = client.get_model_metadata(MODEL, as_json=True)
found["config"] = client.get_model_config(MODEL, as_json=True)
found["index"] = client.get_model_repository_index(as_json=True)

encoded = tensor(blocking, "encoded_image", files, "BYTES")
plain = infer(client, blocking, [encoded], request_id="7")
found["plain"] = {
    "id": plain.get_response().id,
    "logits": listed(plain, "logits"),
    "names": [o.name for o in plain.get_response().outputs],
}
steered = infer(client, blocking, [encoded], ["head_gate"], parameters={"profile": "Shirt", "strength": "0.5"})
found["steered"] = {
    "names": [output.name for output in steered.get_response().outputs],
    "head_gate": listed(steered, "head_gate"),
    "receipt": {
        name: value.string_param for name, value in steered.get_response().parameters.items() if value.string_param
    },
}
pixels = np.zeros((3, 28, 28, 1), np.uint8)
shape = (3, 5, 2)
latent, scale, shift = np.zeros(shape, np.int64), np.ones(shape, np.float32), np.zeros(shape, np.float32)
shift[1, :, 1], latent[1, :, 1] = 5.0, 7
terms = [
    tensor(blocking, "steering_latent", latent, "INT64"),
    tensor(blocking, "steering_scale", scale, "FP32"),
    tensor(blocking, "steering_shift", shift, "FP32"),
]
image = tensor(blocking, "image", pixels, "UINT8")
found["by_tensors"] = listed(infer(client, blocking, [image, *terms], ["gate_logit"]), "gate_logit")
found["residual"] = list(infer(client, blocking, [image], ["residual"]).as_numpy("residual").shape)
classes = client.infer(MODEL, [encoded], outputs=[blocking.InferRequestedOutput("logits", class_count=3)])
found["classes"] = [[element.decode() for element in row] for row in classes.as_numpy("logits")]
found["statistics"] = client.get_inference_statistics(MODEL, as_json=True)


def stream():
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error))
    try:
        with contextlib.suppress(InferenceServerException):  # the stream may have been refused already
            client.async_stream_infer(MODEL, [image])
        if error := answers.get(timeout=30):
            raise error
    finally:
        client.stop_stream(cancel_requests=True)


shared_output = blocking.InferRequestedOutput("logits")
shared_output.set_shared_memory("region", 120)
shared_input = blocking.InferInput("image", [3, 28, 28, 1], "UINT8")
shared_input.set_shared_memory("region", 3 * 784)
errors = {
    "model": lambda: client.infer("resnet", [image]),
    "terms": lambda: infer(client, blocking, [image, *terms[:2]]),
    "classes": lambda: client.infer(
        MODEL, [image], outputs=[blocking.InferRequestedOutput("head_gate", class_count=3)]
    ),
    "shared output": lambda: client.infer(MODEL, [image], outputs=[shared_output]),
    "shared input": lambda: client.infer(MODEL, [shared_input]),
    "shared memory": client.get_system_shared_memory_status,
    "stream": stream,
    "tracing": client.get_trace_settings,
}
found["errors"] = {}
for name, call in errors.items():
    try:
        call()
        found["errors"][name] = ["OK", ""]
    except InferenceServerException as error:
        found["errors"][name] = [error.status(), error.message()]


async def together():
    async with aio.InferenceServerClient(address) as one:
        answers = await asyncio.gather(
            *(infer(one, aio, [tensor(aio, "encoded_image", files[i : i + 1], "BYTES")]) for i in range(len(files)))
        )
        return [listed(answer, "logits")[0] for answer in answers]


found["aio"] = asyncio.run(together())
print(json.dumps(found))
