"""A server that gets unexpected messages: checks the status and the sentence of each answer, and that it still
works."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.message import Message

from service.pb import open_inference_pb2, steering_pb2
from service.pb import steering_pb2 as pb

DOCUMENTED = {
    "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "FAILED_PRECONDITION", "PERMISSION_DENIED",
    "UNIMPLEMENTED",
}  # fmt: skip
"""Errors of both protocols, but for a deadline that passes: here that would be a server that hangs."""
CALLS = {
    f"/{service.full_name}/{method.name}": method.input_type
    for file in (steering_pb2, open_inference_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every RPC of ours, and its request message."""
PREDICT = "/steering.v1.SteeringService/Predict"
INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Said:
    status: str
    sentence: str
    answer: bytes


class Live:
    def __init__(self, address: str, good: Path, profile: str = ""):
        """good: an image whose answer, under this profile or that of its class, must not change."""
        self.channel = grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)])
        self._good = pb.PredictRequest(
            images=[pb.Image(encoded=good.read_bytes())],
            steering=pb.Steering(profile=profile or good.parent.name),
            top_k=5,
        ).SerializeToString()
        self._expected = self._predictions()

    def send(self, call: str, message: Message | bytes) -> Said:
        """An undocumented status, or one without a sentence, fails here; so does what harms the next request."""
        content = message if isinstance(message, bytes) else message.SerializeToString()
        said = self._ask(call, content)
        assert said.status == "OK" or said.status in DOCUMENTED, said
        assert (said.status == "OK") == (not said.sentence), said
        assert len(said.sentence) < 1000
        assert self._predictions() == self._expected, f"another answer after {call} {said}"
        return said

    def _ask(self, call: str, content: bytes) -> Said:
        raw: Callable[..., bytes] = self.channel.unary_unary(call)
        try:
            return Said("OK", "", raw(content, timeout=20))
        except grpc.RpcError as error:
            return Said(error.code().name, error.details(), b"")

    def _predictions(self) -> list[pb.Prediction]:
        said = self._ask(PREDICT, self._good)
        assert said.status == "OK", said
        return list(pb.PredictResponse.FromString(said.answer).predictions)
