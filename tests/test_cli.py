"""The command `steervit`: its help, imports, exit statuses, and its output for a running server."""

import json
import os
import pkgutil
import pty
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import ROOT, SAMPLES, ServerProcess, run_main

from export.bundle import Bundle
from service.cli import COMMANDS
from service.client import Client
from service.client.__main__ import in_calls
from service.client.tables import models_table
from service.client.unit_map import unit_map
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb

ENTRY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["steervit"]
main: Callable[[Sequence[str] | None], int] = pkgutil.resolve_name(ENTRY)
SCRIPT = f"import sys\nfrom {ENTRY.replace(':', ' import ')}\nsys.exit(main())\n"
"""What pip writes as the command `steervit`."""
SHIRTS = [str(path.relative_to(ROOT)) for path in sorted((SAMPLES / "Shirt").glob("*.png"))[:3]]
COLOUR = re.compile(r"\033\[\d*m")


def steervit(*arguments: str, python: Sequence[str] = (), **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process. python: options of Python."""
    command = [sys.executable, *python, "-c", SCRIPT, *arguments]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("columns", ["80", "200"])
def test_every_help_fits_80_columns(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    whole = run_main(main, "--help").stdout
    for name, command in COMMANDS.items():
        assert f"\n  {name} " in whole
        if command.parser:
            done = run_main(main, *name.split(), "--help")
            assert done.returncode == 0
            assert done.stdout.startswith(f"usage: steervit {name} ")
            whole += done.stdout
    assert [line for line in whole.splitlines() if len(line) > 80] == []
    assert not re.search(r"\b(float|tuple|null|None)\b", whole), "names of Python's"


def test_a_help_imports_little() -> None:
    """The list of commands needs only the standard library. The flags of a command, and errors in training settings,
    need nothing that an extra installs, and none of the packages that compute."""
    code = (
        "import sys\n"
        "from service.cli import COMMANDS, main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(roots - sys.stdlib_module_names), file=sys.stderr)\n"
        "for name, command in COMMANDS.items(): command.parser and main([*name.split(), '--help'])\n"
        "assert main(['train', '--out', 'run', '--vit.dim', 'x']) == 2\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(roots - sys.stdlib_module_names), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, env=alone(None))
    first, refusal, every = (set(line.split()) for line in done.stderr.splitlines())
    assert "--vit.dim" in refusal
    assert first == {"__main__", "service"}
    assert {"numpy", "grpc", "pydantic_settings"} <= every
    assert every.isdisjoint({"torch", "onnxruntime", "onnx", "scipy", "matplotlib", "argcomplete", "PIL", "uvloop"})


def alone(folder: Path | None, *names: str) -> dict[str, str]:
    """The environment of a process that, with Python's option -S, sees only these distributions, linked into the
    folder; without a folder, all."""
    site = Path(str(distribution("numpy").locate_file("")))
    for name in names:
        (found,) = Distribution.discover(name=name, path=[str(site)])  # not the metadata beside the sources
        for file in found.files or ():
            top = Path(*file.parts[: 2 if file.parts[0] == "google" else 1])  # a namespace, shared by distributions
            if folder and file.parts[0] != ".." and not (folder / top).exists():
                (folder / top).parent.mkdir(exist_ok=True)
                (folder / top).symlink_to(site / top)
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder or site}"}


def test_the_client_needs_grpc_protobuf_and_numpy_alone(server: ServerProcess, tmp_path: Path) -> None:
    environment = alone(tmp_path, "grpcio", "typing_extensions", "protobuf", "numpy", "pillow", "steervit")
    users = (
        "import sys\n"
        "from pathlib import Path\n"
        "from service.client import Client, SteeringTerm\n"
        f"with Client({server.address!r}) as client:\n"
        f"    images = [Path({SHIRTS[0]!r}).read_bytes()]\n"
        "    client.predict(images, terms={0: (SteeringTerm(latent=7, shift=2.5),)})\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(roots - sys.stdlib_module_names))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", users], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported = {name for name in done.stdout.split() if "cython" not in name}  # added by Cython
    assert imported == {"__main__", "service", "grpc", "google", "numpy", "typing_extensions"}
    done = steervit("predict", "--address", server.address, *SHIRTS, python=["-S"], **environment)
    assert done.returncode == 0, done.stderr
    for command, needs, install in (
        ("train", "the extra train; missing: torch, torchvision, timm and", f"'{ROOT}[train]'"),
        ("export", "the extras train and export; missing: torch,", f"'{ROOT}[train,export]'"),
        ("serve", "the base installation; missing: uvloop.", f"'{ROOT}'"),
    ):
        done = steervit(command, "--out", "run", python=["-S"], **environment)
        assert done.returncode == 1
        assert done.stderr.startswith(f"steervit {command} needs {needs}")
        assert done.stderr.endswith(f" Install: pip install {install}\n")


def test_json_has_what_the_server_answered(server: ServerProcess, client: Client, bundle: Bundle) -> None:
    at = ("--address", server.address, "--json")

    def answer(*arguments: str) -> dict[str, list[dict[str, object]]]:
        done = run_main(main, *arguments, *at)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        content: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
        return content

    images = [Path(ROOT / name).read_bytes() for name in SHIRTS]
    steered = client.predict(images, profile="Shirt", top_k=3)
    predictions = answer("predict", "--profile", "Shirt", "--top-k", "3", *SHIRTS)["predictions"]
    assert [shown["image"] for shown in predictions] == SHIRTS
    for shown, expected in zip(predictions, steered.predictions, strict=True):
        assert shown["classes"][0]["label"] == expected.classes[0].label  # type: ignore[index]
        assert [block["kept"] for block in shown["head_mask"]] == [list(b.kept) for b in expected.head_mask]  # type: ignore[attr-defined]
    compared = answer("compare", "--profile", "Shirt", *SHIRTS)["comparisons"]
    assert [shown["steered"]["head_usage"] for shown in compared] == [shown["head_usage"] for shown in predictions]  # type: ignore[index]
    explained = answer("explain", "--latents", "2", SHIRTS[0])["explanations"]
    assert [len(site["latents"]) for site in explained[0]["sites"]] == [2] * len(bundle.manifest.sites)  # type: ignore[attr-defined]
    assert {profile["name"] for profile in answer("profiles")["profiles"]} == set(bundle.profiles)
    (model,) = answer("models")["models"]
    assert (model["state"], model["model"]["labels"]) == ("READY", list(bundle.manifest.labels))  # type: ignore[index]
    assert answer("load", "--seconds", "0.2", *SHIRTS)["errors"] == {}


def test_units_of_repeated_flags_are_all_forced(server: ServerProcess, client: Client) -> None:
    flags = ("--open", "1/h0,2/m1", "--open", "2/h1", "--closed", "3/m0", "--closed", "4/h2")
    done = run_main(main, "predict", *flags, "--address", server.address, "--json", *SHIRTS)
    images = [Path(ROOT / name).read_bytes() for name in SHIRTS]
    same = client.predict(images, open=["1/h0", "2/m1", "2/h1"], closed=["3/m0", "4/h2"])
    assert json.loads(done.stdout)["receipt"]["steering_digest"] == same.receipt.steering_digest


def test_exit_statuses_and_their_reasons(server: ServerProcess) -> None:
    at = ("--address", server.address)
    for status, reason, arguments in (
        (2, "the following arguments are required: COMMAND", ()),
        (2, "invalid choice: 'predictt'", ("predictt",)),
        (2, "steervit predict: error: the following arguments are required: IMAGE", ("predict",)),
        (2, "usage: steervit verify BUNDLE", ("verify",)),
        (2, "--repository is missing: Field required", ("serve",)),
        (1, "BundleError: ", ("verify", "nowhere")),
        (1, "NOT_FOUND: steering.profile is 'Shoe'", ("predict", "--profile", "Shoe", *at, SHIRTS[0])),
        (1, "nowhere: No such file or directory", ("profiles", "check", "nowhere", "--bundle", "deploy/models")),
        (2, "steervit profiles check: error: the following arguments are required: FOLDER", ("profiles", "check")),
        (2, "--rate is nan; allowed: 0 (by --concurrency) or more", ("load", "--rate", "nan", SHIRTS[0])),
        (2, "--within-ms is -1.0; allowed: 0 (not reported) or more", ("load", "--within-ms", "-1", SHIRTS[0])),
        (2, "--timeout is inf; allowed: a number above 0", ("predict", "--timeout", "inf", SHIRTS[0])),
        (2, r"name is 'a\nb'; allowed: printable ASCII", ("models", "--client-name", "a\nb")),
        (2, "top_k is 99999999999; allowed: a number that fits the field", ("predict", "--top-k", "9" * 11, SHIRTS[0])),
        (2, r"profile is '\udcff'; allowed: Unicode text", ("load", "--profile", "\udcff", SHIRTS[0])),
        (2, "--port is 'many': ", ("doctor", "--repository", "deploy/models", "--port", "many")),
    ):
        done = run_main(main, *arguments)
        assert (done.returncode, done.stdout) == (status, ""), arguments
        assert reason in done.stderr
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    command = [sys.executable, "-c", heard + SCRIPT, "load", "--seconds", "60", *at, *SHIRTS]
    before = server.count("steervit_images_total")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while server.count("steervit_images_total") < before + 10:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_units_are_drawn_in_colour_on_a_terminal_alone(server: ServerProcess, client: Client) -> None:
    """Without colours the text is the same."""

    def on_a_terminal(**environment: str) -> str:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", SCRIPT, "compare", "--profile", "Shirt", "--address", server.address, *SHIRTS]
        env = os.environ | {"TERM": "xterm"} | environment
        subprocess.run(command, cwd=ROOT, env=env, stdout=theirs, stderr=theirs, check=True)
        os.close(theirs)
        parts = []
        while part := _read(ours):
            parts.append(part)
        os.close(ours)
        return b"".join(parts).decode().replace("\r\n", "\n")

    piped = steervit("compare", "--profile", "Shirt", "--address", server.address, *SHIRTS).stdout
    coloured, plain = on_a_terminal(), on_a_terminal(NO_COLOR="1")
    assert "\033[" not in piped + plain
    assert {"\033[36m", "\033[31m"} <= set(COLOUR.findall(coloured)), "heads, and those that run less often"
    without_times = [re.sub(r"queue .*", "", COLOUR.sub("", text)) for text in (coloured, plain, piped)]
    assert without_times[0] == without_times[1] == without_times[2]
    answer = client.predict([Path(ROOT / SHIRTS[0]).read_bytes()])
    first = answer.predictions[0].head_mask[0]
    drawn = " ".join("##" if kept else "  " for kept in first.kept)  # the captured output has no encoding
    assert (
        f"  block {first.block:>2} │{drawn}│"
        in run_main(main, "predict", "--address", server.address, SHIRTS[0]).stdout
    )


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # on Linux: the other end is closed
        return b""


def test_a_map_has_heads_and_mlp_groups_and_shades_between() -> None:
    def image(heads: str, groups: str) -> SimpleNamespace:
        masks = ([SimpleNamespace(block=10, kept=[mark == "1" for mark in marks])] for marks in (heads, groups))
        return SimpleNamespace(**dict(zip(("head_mask", "mlp_mask"), masks, strict=True)))

    both = [image("110", "10"), image("100", "00")]
    assert unit_map([("a", both)], colour=False).splitlines() == [  # type: ignore[list-item]
        "            a",
        "            h0 h1 h2 m0 m1",
        "  block 10 │██ ▒▒   │▒▒   │",
    ]


def test_models_that_are_not_served_say_why() -> None:
    broken = oi.RepositoryIndexResponse.ModelIndex(name="a", version="2", state="UNAVAILABLE", reason="no graph")
    lines = models_table([(broken, None)]).splitlines()
    assert lines[2].split() == ["a", "2", "UNAVAILABLE", *"--------"]
    assert lines[3:] == ["", "a version 2: no graph"]


def test_the_receipt_of_several_calls_is_of_all_their_images(tmp_path: Path) -> None:
    """Of 64 and of 36 images."""
    first = pb.Receipt(
        version="1", head_usage=0.5, mlp_usage=1, compute_fraction=0.75, gates_near_threshold=2, queue_seconds=0.25,
        inference_seconds=1, budget=0.7, budget_applied=0.5, brownout=True,
    )  # fmt: skip
    second = pb.Receipt(
        version="2", head_usage=0.25, mlp_usage=0.5, compute_fraction=0.5, queue_seconds=0.5, inference_seconds=2,
        budget=0.7, budget_applied=0.7,
    )  # fmt: skip
    both = pb.Receipt(
        version="2", head_usage=0.41, mlp_usage=0.82, compute_fraction=0.66, gates_near_threshold=2,
        queue_seconds=0.75, inference_seconds=3, budget=0.7, budget_applied=0.5, brownout=True,
    )  # fmt: skip
    receipts = iter([first, second])

    def call(images: Sequence[bytes], **asked: Any) -> pb.PredictResponse:
        return pb.PredictResponse(predictions=[pb.Prediction()] * len(images), receipt=next(receipts))

    file = tmp_path / "image"
    file.write_bytes(b"")
    answer = in_calls(call, [file] * 100, {})
    assert len(answer.predictions) == 100
    assert answer.receipt == both


COMPLETED = {
    "steervit pre": {"predict"},
    "steervit compare --str": {"--strength"},
    "steervit serve --provider ": {"auto", "cpu", "cuda"},
    "steervit evaluate --sae.la": {"--sae.latents"},
    "steervit verify deploy/mod": {"deploy/models/"},
    "steervit profiles che": {"check"},
    "steervit profiles check --bun": {"--bundle"},
    "steervit profiles --add": {"--address"},
}
BASH = """
eval "$(steervit completion bash)"
for COMP_LINE in "$@"; do
    COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
    read -ra COMP_WORDS <<< "$COMP_LINE"
    [[ $COMP_LINE == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _python_argcomplete steervit
    echo "${COMPREPLY[@]}"
done
"""
"""What bash does for the tab key, for each line."""


def test_bash_completes_commands_flags_choices_and_files(tmp_path: Path) -> None:
    (tmp_path / "steervit").write_text(f"#!{sys.executable}\n{SCRIPT}")
    (tmp_path / "steervit").chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = ["bash", "-c", BASH, "bash", *COMPLETED]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    replies = [set(line.split()) for line in done.stdout.splitlines()]
    assert replies == list(COMPLETED.values()), done.stderr
