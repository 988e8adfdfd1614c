"""The faults that the server must survive, and the mark of the tests that show one.

    @fault("request: too many terms", "INVALID_ARGUMENT: steering.terms has 513 entries; allowed: 512", STEERING)

table.py makes the table of all of them, tests/README.md, from these marks.
"""

import pytest

STEERING, OPEN_INFERENCE = "steering.v1", "Open Inference"
BOTH = (STEERING, OPEN_INFERENCE)
SERVER = ("",)
"""For a fault without a protocol."""

FAULTS: dict[str, tuple[str, ...]] = {
    "bundle: missing file": SERVER,
    "bundle: wrong checksum": SERVER,
    "bundle: newer schema": SERVER,
    "bundle: older schema": SERVER,
    "bundle: truncated graph": SERVER,
    "bundle: golden mismatch": SERVER,
    "bundle: version that fails to load while an older one serves": SERVER,
    "bundle: swap under load": SERVER,
    "bundle: unload in use": SERVER,
    "request: wrong dtype": (OPEN_INFERENCE,),
    "request: wrong rank": (OPEN_INFERENCE,),
    "request: wrong size": BOTH,
    "request: wrong byte count": (OPEN_INFERENCE,),
    "request: negative dims": (OPEN_INFERENCE,),
    "request: overflowing dims": (OPEN_INFERENCE,),
    "request: empty batch": BOTH,
    "request: batch over the limit": BOTH,
    "request: unknown model": BOTH,
    "request: unknown version": BOTH,
    "request: unknown profile": BOTH,
    "request: profile name in another Unicode form": BOTH,
    "request: unknown input": (OPEN_INFERENCE,),
    "request: unknown output": (OPEN_INFERENCE,),
    "request: unknown parameter": (OPEN_INFERENCE,),
    "request: duplicate inputs": (OPEN_INFERENCE,),
    "request: duplicate outputs": (OPEN_INFERENCE,),
    "request: contents that contradict each other": (OPEN_INFERENCE,),
    "request: NaN scale": BOTH,
    "request: infinite scale": BOTH,
    "request: strength that is no number": BOTH,
    "request: latent out of range": BOTH,
    "request: site out of range": BOTH,
    "request: duplicate latents": BOTH,
    "request: too many terms": BOTH,
    "request: conflicting profile and terms": BOTH,
    "request: terms made for other weights": (STEERING,),
    "request: top_k out of range": BOTH,
    "request: no image": BOTH,
    "request: unreadable image": BOTH,
    "request: image of a kind that is not read": BOTH,
    "request: truncated JPEG": BOTH,
    "request: lying JPEG": BOTH,
    "request: decompression bomb": BOTH,
    "request: animated image": BOTH,
    "request: CMYK image": BOTH,
    "request: 16-bit image": BOTH,
    "request: EXIF-rotated image": BOTH,
    "request: photo with broken EXIF": BOTH,
    "request: photo with broken metadata": BOTH,
    "request: several pictures in a JPEG": BOTH,
    "request: null characters": BOTH,
    "request: not a message": BOTH,
    "request: 100 MB message": BOTH,
    "time: deadline shorter than the queue": BOTH,
    "time: cancel in queue": BOTH,
    "time: cancel in flight": BOTH,
    "time: slow reader": SERVER,
    "time: client killed": SERVER,
    "time: queue full": BOTH,
    "time: priority inversion": SERVER,
    "client: over a limit of its own": BOTH,
    "client: a model that it may not call": BOTH,
    "client: a noisy neighbour": SERVER,
    "client: limits that are wrong": SERVER,
    "process: SIGTERM under load": SERVER,
    "process: second SIGTERM": SERVER,
    "process: SIGHUP": SERVER,
    "process: file change": SERVER,
    "process: out-of-memory provider error, then recovery": SERVER,
    "process: connection flood": SERVER,
    "process: port in use": SERVER,
    "process: read-only file system": SERVER,
    "process: non-root": SERVER,
    "steering: budget out of range": BOTH,
    "steering: budget for a model without a dial": BOTH,
    "steering: gate biases for graphs without the input": BOTH,
    "steering: unit that does not exist": (STEERING,),
    "steering: unit forced both ways": (STEERING,),
    "steering: every head off in a block": BOTH,
    "steering: extreme strengths": BOTH,
    "steering: mixed batch equals single requests": BOTH,
    "steering: profile store swapped while in use": SERVER,
}
"""The faults by name, with the protocols that need a test."""


def fault(name: str, sees: str, protocol: str = "") -> pytest.MarkDecorator:
    """Mark a test of this fault. sees: what the client sees, in Markdown."""
    if protocol not in FAULTS.get(name, ()):
        raise ValueError(f"fault {name!r} with protocol {protocol!r}; allowed: {FAULTS.get(name, list(FAULTS))}")
    return pytest.mark.fault(name, sees, protocol)
