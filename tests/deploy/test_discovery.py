"""How a client of the headless Service finds a new pod: two real servers, and a DNS server that tells of the second."""

import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from processes import ROOT, SMALL, ServerProcess, serving, until

from service.pb import open_inference_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub

NAME = "steervit-pods.steervit.svc"
SERVICE_CONFIG = (ROOT / "service" / "client" / "service_config.json").read_text()
A_RECORD = 1


class Dns(socketserver.ThreadingUDPServer):
    """Answers questions for the IPv4 address of any name with `addresses`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.addresses: list[str] = []


class Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        message, socket = self.request
        end = message.index(b"\0", 12) + 5  # the name, its type and its class
        (kind,) = struct.unpack("!H", message[end - 4 : end - 2])
        assert isinstance(self.server, Dns)
        addresses = self.server.addresses if kind == A_RECORD else []
        header = message[:2] + struct.pack("!5H", 0x8180, 1, len(addresses), 0, 0)
        records = [
            # The question's name again, an address, for no time.
            struct.pack("!3HIH4B", 0xC00C, A_RECORD, 1, 0, 4, *map(int, address.split(".")))
            for address in addresses
        ]
        socket.sendto(header + message[12:end] + b"".join(records), self.client_address)


@contextmanager
def dns() -> Iterator[Dns]:
    with Dns() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def answered(server: ServerProcess) -> float:
    return server.count("steervit_requests_total", code="OK", method="/inference.GRPCInferenceService/ModelReady")


def test_a_client_finds_a_new_pod_when_its_connection_ends_by_age_and_asks_the_dns_at_most_every_30_s() -> None:
    age = ("--max-connection-age-seconds", "1")
    with dns() as names, serving(SMALL, *age) as old:
        port = old.address.rpartition(":")[2]
        names.addresses = ["127.0.0.1"]
        target = f"dns://127.0.0.1:{names.server_address[1]}/{NAME}:{port}"
        options = [("grpc.service_config", SERVICE_CONFIG)]
        eager = [*options, ("grpc.dns_min_time_between_resolutions_ms", 100)]
        with grpc.insecure_channel(target, eager) as quick, grpc.insecure_channel(target, options) as usual:

            def call(channel: grpc.Channel) -> None:
                stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
                stub.ModelReady(pb.ModelReadyRequest(name="small"), timeout=10)

            call(quick)
            call(usual)
            with serving(SMALL, *age, "--host", "127.0.0.2", "--port", port) as new:
                names.addresses = ["127.0.0.1", "127.0.0.2"]

                def found() -> bool:
                    call(quick)
                    return answered(new) > 0

                until(found, 15)
                before = answered(new)
                for _ in range(20):
                    call(usual)
                assert answered(new) == before
                # As a pod that leaves: gone from the DNS first.
                names.addresses = ["127.0.0.2"]
                quiet = answered(old)

                def left() -> bool:
                    nonlocal quiet
                    last = quiet
                    for _ in range(10):
                        call(quick)
                    quiet = answered(old)
                    return quiet == last

                until(left, 15)
