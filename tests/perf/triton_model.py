"""What Triton's Python backend runs in the bench: our graph on onnxruntime, without steering."""

import json
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.outputs = [output["name"] for output in json.loads(args["model_config"])["output"]]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["threads"]["string_value"])
        graph = parameters["graph"]["string_value"]
        self.session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
        self.sites = self.session.get_inputs()[1].shape[1]
        biases = [given.shape[2] for given in self.session.get_inputs() if given.name == "gate_bias"]
        self.units = biases[0] if biases else 0

    def execute(self, requests: list[Any]) -> list[Any]:
        parts = [triton.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        images = parts[0] if len(parts) == 1 else np.concatenate(parts)
        shape = (len(images), self.sites, 0)
        inputs = {
            "image": images, "steering_latent": np.zeros(shape, np.int64),
            "steering_scale": np.zeros(shape, np.float32), "steering_shift": np.zeros(shape, np.float32),
        }  # fmt: skip
        if self.units:
            inputs["gate_bias"] = np.zeros((len(images), self.sites, self.units), np.float32)
        results = self.session.run(self.outputs, inputs)
        responses, first = [], 0
        for part in parts:
            rows = slice(first, first + len(part))
            first = rows.stop
            tensors = [triton.Tensor(name, value[rows]) for name, value in zip(self.outputs, results, strict=True)]
            responses.append(triton.InferenceResponse(tensors))
        return responses
