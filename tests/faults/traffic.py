"""The other client: it sends valid requests all the time, in both protocols, while something goes wrong elsewhere."""

import itertools
import threading
import time
from collections.abc import Collection, Mapping
from types import TracebackType

import grpc
import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from tests.faults.protocols import PROTOCOLS, Alone
from tests.processes import until


class Traffic:
    """A context: at its end, answers have arrived after everything done within, and all of them were right."""

    def __init__(
        self,
        address: str,
        images: NDArray[np.uint8],
        expected: Mapping[str, Alone],
        bundle: Bundle,
        refusals: Collection[str] = (),
    ):
        """expected: by profile. refusals: statuses after which it tries again."""
        self._address, self._images, self._expected, self._bundle = address, images, expected, bundle
        self._refusals = refusals
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.answered = 0
        self.slowest = 0.0
        """The longest time of an answered call, seconds."""
        self.problems: list[str] = []

    def check(self) -> None:
        """Wait for answers to requests sent from now on; all answers so far must be right."""
        enough = self.answered + 3  # one may be in flight already; one of each protocol is new
        until(lambda: self.answered >= enough or bool(self.problems), 30)
        assert self.problems == []

    def __enter__(self) -> "Traffic":
        self._thread.start()
        until(lambda: self.answered > 0 or bool(self.problems))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.check()
        finally:
            self._done.set()
            self._thread.join()

    def _ask(self) -> None:
        rows = itertools.cycle(range(len(self._images)))
        with grpc.insecure_channel(self._address) as channel:
            kinds = itertools.cycle(itertools.product(self._expected, PROTOCOLS))
            while not self._done.is_set():
                (profile, protocol), row = next(kinds), next(rows)
                request = protocol.request(self._images[row : row + 1], profile)
                start = time.monotonic()
                try:
                    answer = protocol.call(channel)(request, timeout=30)
                except grpc.RpcError as error:
                    if error.code().name not in self._refusals:
                        self.problems.append(f"{protocol.name}: {error.code().name}: {error.details()}")
                    self._done.wait(0.01)
                    continue
                self.slowest = max(self.slowest, time.monotonic() - start)
                wrong = self._expected[profile].wrong(protocol.read(answer, self._bundle), [row])
                self.problems += [f"{protocol.name}, {profile or 'no profile'}: {problem}" for problem in wrong]
                self.answered += 1
                self._done.wait(0.03)
