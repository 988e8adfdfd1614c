"""python -m tests.perf.capacity: how much a machine serves, and what memory it takes.

The figures of deploy/CAPACITY.md: one server with all cores, and two with half of them each behind a client that takes
turns between them; few and many profiles; the committed bundle, and DeiT-S with and without closed heads. The client is
on the same machine, so servers on machines of their own do more. Writes build/bench/capacity.json, prints tables.
"""

import argparse
import contextlib
import gzip
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from service.client.load import Load, Report
from service.client.tables import table
from tests.committed import BUNDLE, newest, pixels
from tests.perf.heads import OUT
from tests.perf.serving import deit_bundle, load, many_profiles, noise, server
from tests.processes import MODELS


def measure(repository: Path, processes: int, images: list[bytes], asked: Load, *flags: str) -> tuple[Report, float]:
    """The load on this many servers, and the memory of one of them afterwards, MiB."""
    with contextlib.ExitStack() as stack:
        threads = ("--threads", str(2 // processes))
        servers = [stack.enter_context(server(repository, *threads, *flags)) for _ in range(processes)]
        report = load("ipv4:" + ",".join(one.address for one in servers), images, asked)
        return report, servers[0].resident_mb()


def line(name: str, processes: int, asked: Load, found: tuple[Report, float]) -> list[str]:
    report, memory = found
    return [
        name, str(processes), str(asked.images_per_call), f"{report.images_per_second:.0f}", f"{report.p50_ms:.1f}",
        f"{report.p99_ms:.1f}", f"{memory:.0f}", str(sum(report.errors.values())),
    ]  # fmt: skip


def throughput(seconds: float) -> list[list[str]]:
    images = [image.tobytes() for image in pixels()]
    labels = tuple(sorted(newest(BUNDLE).profiles))
    rows = []
    for processes in (1, 2):
        for count, at_a_time in ((1, 32), (16, 8)):
            for name, profiles in (("committed, no steering", ("",)), ("committed, its profiles", labels)):
                asked = Load(at_a_time, seconds, count, profiles)
                rows.append(line(name, processes, asked, measure(MODELS, processes, images, asked)))
    repository = deit_bundle()
    large = noise(newest(repository / "deit_s").manifest.image.shape, 16)
    thirds = tuple(f"third{offset}" for offset in range(6))
    for processes in (1, 2):
        for name, profiles in (("DeiT-S, all heads", ("all",)), ("DeiT-S, a third of the heads", thirds)):
            asked = Load(16, 2 * seconds, 1, profiles)
            rows.append(line(name, processes, asked, measure(repository, processes, large, asked)))
    return rows


def overload(seconds: float) -> list[list[str]]:
    """DeiT-S at multiples of its capacity: how many calls are still answered, and how soon the rest is refused."""
    repository = deit_bundle()
    images = noise(newest(repository / "deit_s").manifest.image.shape, 16)
    flags = ("--max-queue", "64")
    capacity = measure(repository, 1, images, Load(16, 2 * seconds, 1, ("all",)), *flags)[0].images_per_second
    rows = [["capacity", f"{capacity:.1f}", "1.00", "", "", ""]]
    for times in (2, 10):
        asked = Load(0, 3 * seconds, 1, ("all",), rate=times * capacity)
        report = measure(repository, 1, images, asked, *flags)[0]
        refused = ", ".join(f"{count} {code}" for code, count in report.errors.items())
        share = report.images_per_second / capacity
        shown = [f"{report.p50_ms:.0f}", refused, f"{report.error_p99_ms:.1f}"]
        rows.append([f"{times} times that", f"{report.images_per_second:.1f}", f"{share:.2f}", *shown])
    return rows


def by_profiles(seconds: float) -> list[list[str]]:
    images = [image.tobytes() for image in pixels()]
    rows = []
    for count in (10, 1_000, 10_000):
        folder, names = many_profiles(count)
        with server(MODELS, "--profiles-dir", str(folder)) as running:
            report = load(running.address, images, Load(8, seconds, 1, names))
            shown = [f"{running.start_seconds:.1f}", f"{report.images_per_second:.0f}", f"{report.p50_ms:.1f}"]
            rows.append([str(count), *shown, f"{running.resident_mb():.0f}"])
    return rows


def scrapes(seconds: float) -> list[list[str]]:
    """Cost of a scrape for the server, by series, and the effect of a scrape each second on calls."""
    images = [image.tobytes() for image in pixels()]
    rows = []
    for count in (10, 200, 640):
        folder, names = many_profiles(count)
        with server(MODELS, "--profiles-dir", str(folder), "--max-profile-series", "1000") as running:
            asked = Load(4, seconds, 1, names)

            def scrape(url: str = running.metrics_url) -> bytes:
                request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})
                with urllib.request.urlopen(request, timeout=30) as page:
                    return bytes(page.read())

            page, before = gzip.decompress(scrape()), cpu_seconds(running.process.pid)
            for _ in range(10):
                scrape()
            each = (cpu_seconds(running.process.pid) - before) / 10
            alone = load(running.address, images, asked)
            done = threading.Event()

            def follow(done: threading.Event = done, scrape: Callable[[], bytes] = scrape) -> None:
                while not done.wait(1):
                    scrape()

            thread = threading.Thread(target=follow)
            thread.start()
            scraped = load(running.address, images, asked)
            done.set()
            thread.join()
        series = sum(not line.startswith(b"#") for line in page.splitlines())
        shown = [f"{1000 * each:.0f}", f"{alone.p99_ms:.1f}", f"{scraped.p99_ms:.1f}"]
        rows.append([str(series), f"{len(page) / 2**20:.1f}", *shown])
    return rows


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process has used so far, by the scheduler's clock, which counts pieces of work shorter than a
    tick too. (The number of the clock: clock_getcpuclockid(3).)"""
    return time.clock_gettime(~pid << 3 | 2)


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.perf.capacity", description=__doc__.split("\n\n")[1])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load (default: %(default)s)")
    parser.add_argument("--only", choices=("throughput", "overload", "profiles", "scrapes"), help="default: all")
    options = parser.parse_args()
    heads = {
        "throughput": (["", "servers", "images a call", "images/s", "p50 ms", "p99 ms", "MiB", "errors"], throughput),
        "overload": (["calls", "answered a second", "of capacity", "p50 ms", "refused", "refusal p99 ms"], overload),
        "profiles": (["profiles", "start s", "images/s", "p50 ms", "MiB"], by_profiles),
        "scrapes": (["series", "MiB", "CPU ms a scrape", "p99 ms", "p99 ms, scraped each second"], scrapes),
    }
    found = {}
    for name in [options.only] if options.only else heads:
        head, part = heads[name]
        rows = part(options.seconds)
        found[name] = [dict(zip(head, row, strict=True)) for row in rows]
        print(f"\n{name}\n{table(head, rows)}", flush=True)
    (OUT / "capacity.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
