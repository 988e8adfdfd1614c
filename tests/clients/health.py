"""python health.py <host:port> <service>: a health probe by grpclib, a gRPC that shares no code with the server's.

Prints what Check says, and then what Watch says, a line each, until the server ends the stream.
"""

import asyncio
import sys

from grpclib.client import Channel
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse


def say(answer: HealthCheckResponse) -> None:
    print(HealthCheckResponse.ServingStatus.Name(answer.status), flush=True)


async def main() -> None:
    host, _, port = sys.argv[1].partition(":")
    async with Channel(host, int(port)) as channel:
        stub, request = HealthStub(channel), HealthCheckRequest(service=sys.argv[2])
        say(await stub.Check(request))
        try:
            async with stub.Watch.open() as stream:
                await stream.send_message(request, end=True)
                async for answer in stream:
                    say(answer)
        except (GRPCError, StreamTerminatedError, ConnectionError):
            return


asyncio.run(main())
