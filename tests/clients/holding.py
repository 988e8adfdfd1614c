"""A client to be stopped or killed: python tests/clients/holding.py <address> <calls> <images a call>, from the root.

Says `sent` when its calls are in progress, and at the end how many images were answered.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpc
import numpy as np

from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub

address, calls, images = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
request = pb.PredictRequest(top_k=10)
for pixels in np.random.default_rng(0).integers(0, 256, (images, 28 * 28), np.uint8):
    request.images.add(pixels=pixels.tobytes())
with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
    stub = SteeringServiceStub(channel)
    under_way = [stub.Predict.future(request, timeout=120) for _ in range(calls)]
    print("sent", flush=True)
    print(sum(len(call.result().predictions) for call in under_way), flush=True)
