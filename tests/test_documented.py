"""What the documentation tells people to type: run here or by another test, or marked as not run; and what it names."""

import ast
import contextlib
import glob
import importlib.util
import io
import re
import shlex
import subprocess
from pathlib import Path

import grpc
import pytest
import yaml
from documented import FENCED, LANGUAGES, PAGES, Block, Command, commands, examples, queries, text
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass
from processes import MODELS, ROOT, ServerProcess, run_main, serving
from prometheus import RULE_FILES, promtool

from export.bundle import Bundle
from service.cli import COMMANDS, main, parser_of
from service.exposition import FAMILIES
from service.pb import steering_pb2
from service.pb.steering_pb2_grpc import SteeringServiceStub

CI = ".ci/run"
FOLDER_OF_IMAGES = "test_journeys.py::test_a_folder_of_colour_images_is_trained_exported_and_served_by_flags_alone"
EVERY_GRAPH = "test_export.py::test_every_graph_of_a_bundle_serves_the_same_answers"
PLAYGROUND = "test_playground.py::test_from_an_upload_to_a_changed_map_of_the_heads"
TYPEFACES = "test_journeys.py::test_the_bundle_of_typefaces_answers_by_its_budgets_and_profiles"
DELIVERY = "test_delivery.py::test_the_commands_of_the_page_do_what_it_says"
RUN_ELSEWHERE = {
    "make demo": CI,
    "make test": CI,
    "make deploy-check": CI,
    "make playground": PLAYGROUND,
    "make playground SERVER=127.0.0.1:8001": PLAYGROUND,
    "steervit playground": PLAYGROUND,
    "steervit export runs/mine deploy/models --name mine": FOLDER_OF_IMAGES,
    "steervit export": EVERY_GRAPH,
    "steervit export runs/mine deploy/models --name mine_shirt --compact-for Shirt":
        "test_export.py::test_a_compact_bundle_is_a_bundle_of_its_own",
    "steervit verify": "test_bundle.py::test_verify_needs_no_torch_and_names_what_is_wrong",
    "steervit serve --repository deploy/typefaces/models": TYPEFACES,
    "steervit predict --budget 0.6 deploy/typefaces/samples/*.png": TYPEFACES,
    'steervit compare --profile "lower case"': TYPEFACES,
    "steervit push": DELIVERY,
    "steervit pull": DELIVERY,
    "steervit predict --version canary": "test_delivery.py::test_rollback_and_canary_are_a_pull_with_a_label",
    "make sbom":
        "deploy/test_release.py::test_a_bill_of_materials_has_what_the_image_installs_with_hashes_and_who_needs_it",
    "jq": "test_access_log.py::test_the_log_of_a_load_says_who_sent_most_who_was_refused_and_what_was_slow_and_why",
    "perf_analyzer": "test_perf_analyzer.py::test_perf_analyzer_measures_one_and_eight_calls_at_a_time",
}  # fmt: skip
"""Commands, whole or by how they begin: by which test, with images, folders or flags of its own; or by the script of
continuous integration."""
SERVER = "127.0.0.1:8001"
SERVICE = steering_pb2.DESCRIPTOR.services_by_name["SteeringService"]
ASKS_A_SERVER = {"predict", "compare", "explain", "profiles", "models", "dial", "load"}


def typed(command: Command) -> str:
    return " ".join(command.text.split()).removeprefix(".venv/bin/")


def elsewhere(command: Command) -> str:
    """What runs it, if it is not run here."""
    begins = [known for known in RUN_ELSEWHERE if typed(command) == known or typed(command).startswith(f"{known} ")]
    return RUN_ELSEWHERE[max(begins, key=len)] if begins else ""


RUN_HERE = sorted({typed(command) for command in commands() if not command.marked and not elsewhere(command)})


def words(line: str) -> list[str]:
    """As a shell would make them, without the program."""
    parts = shlex.split(line)[1:]
    return [name for part in parts for name in (sorted(glob.glob(part, root_dir=ROOT)) or [part])]


def test_every_block_has_a_language() -> None:
    for page in PAGES:
        assert {language for _, language, _ in FENCED.findall(text(page))} <= LANGUAGES, f"{page}: ```sh and the like"
        assert text(page).count("```") == 2 * len(FENCED.findall(text(page))), page


def test_every_command_is_run_or_is_marked_as_not_run() -> None:
    """Those of test_a_documented_command_works, those of tests that are named, and the rest marked."""
    assert len(commands()) > 80
    unknown = [line for line in RUN_HERE if not line.startswith("steervit ")]
    assert unknown == [], "run by no test: name one in RUN_ELSEWHERE, or mark them `not run here`"
    assert set(RUN_ELSEWHERE.values()) == {elsewhere(command) for command in commands()} - {""}
    for test in set(RUN_ELSEWHERE.values()) - {CI}:
        file, name = test.split("::")
        functions = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
        assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, test
    script = (ROOT / CI).read_text().splitlines()
    assert {command for command, where in RUN_ELSEWHERE.items() if where == CI} <= set(script)


@pytest.mark.parametrize("line", [line for line in RUN_HERE if line.startswith("steervit ")])
def test_a_documented_command_works(line: str, server: ServerProcess, bundle: Bundle) -> None:
    given = words(line)
    if given[0] == "serve":
        flags = shlex.split(re.sub(r"--(repository deploy/models|(metrics-)?port \d+)", "", line))[2:]
        if flags:  # others than the server has that all tests share
            with serving(MODELS, *flags):
                pass
        return
    if given[0] in ASKS_A_SERVER and given[1:2] != ["check"]:
        given += ["--address", server.address]
    if given[0] == "load":
        given += ["--seconds", "0.2"]
    done = run_main(main, *given)
    if not bundle.manifest.dial and {"dial", "--budget", "--open"} & set(given):
        assert done.returncode == 1, "the page says that the committed bundle has no dial"
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize("command", [c for c in commands() if typed(c).startswith("steervit ")], ids=typed)
def test_every_command_of_steervit_has_flags_that_there_are(command: Command) -> None:
    given = words(typed(command))
    name = " ".join(given[:2]) if " ".join(given[:2]) in COMMANDS else given[0]
    parser_of(name).parse_args(given[len(name.split()) :])


@pytest.mark.parametrize("command", [c for c in commands() if c.program == "make"], ids=typed)
def test_every_target_of_make_can_be_made(command: Command) -> None:
    subprocess.run(["make", "-n", *words(command.text)], cwd=ROOT, check=True, capture_output=True)


def test_the_server_answers_what_grpcurl_would_send(server: ServerProcess) -> None:
    """grpcurl is not here: a function of the shell prints its arguments, and Python sends the message."""
    with grpc.insecure_channel(server.address) as channel:
        stub = SteeringServiceStub(channel)  # type: ignore[no-untyped-call]
        for command in (command for command in commands() if command.program == "grpcurl"):
            shell = f"grpcurl() {{ printf '%s\\0' \"$@\"; }}; {command.text}"
            done = subprocess.run(["bash", "-c", shell], cwd=ROOT, check=True, capture_output=True, text=True)
            plaintext, *given, _ = done.stdout.split("\0")
            assert plaintext == "-plaintext"
            if "describe" in given:
                assert given == [SERVER, "describe", SERVICE.full_name]
            else:
                message, address, method = given[1:]
                assert (given[0], address) == ("-d", SERVER)
                service, _, name = method.partition("/")
                assert service == SERVICE.full_name
                request = json_format.Parse(message, GetMessageClass(SERVICE.methods_by_name[name].input_type)())
                assert getattr(stub, name)(request, timeout=10).ByteSize() > 100


@pytest.mark.parametrize("example", [e for e in examples() if "tritonclient" not in e.text], ids=lambda e: e.page)
def test_an_example_in_python_works(example: Block, server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_open_inference.py runs the one for tritonclient."""
    monkeypatch.chdir(ROOT)
    code = example.text.replace(SERVER, server.address).replace("steervit-pods.steervit.svc:8001", server.address)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, example.page, "exec"), {"Path": Path, "grpc": grpc})
    assert out.getvalue().count("\n") == 10 * code.count("print(")


def test_every_query_is_promql_and_reads_metrics_that_there_are(tmp_path: Path) -> None:
    rules = [{"record": f"documented:query:{number}", "expr": query} for number, query in enumerate(queries())]
    assert len(rules) > 30
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "documented", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "rules.yaml"))
    recorded = re.findall(r"record: (\S+)", " ".join(path.read_text() for path in RULE_FILES))
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    there = {family.name + suffix for family in FAMILIES for suffix in suffixes[family.kind]} | set(recorded)
    for query in queries():
        assert set(re.findall(r"[\w:]*steervit_\w+(?::\w+)?|slo:[\w:]+", re.sub(r'"[^"]*"', "", query))) <= there, query


def test_what_is_named_in_a_sentence_exists() -> None:
    """Modules to run, targets of make, commands of steervit, between backticks."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    for page in PAGES:
        for named in re.findall(r"`([^`\n]+)`", FENCED.sub("", text(page))):
            if module := re.match(r"(?:\S+/)?python -m ([\w.]+)", named):
                assert importlib.util.find_spec(module[1]), f"{page}: {named}"
            elif make := re.match(r"make ([a-z-]+(?: [a-z-]+)*)(?= |$)", named):
                assert set(make[1].split()) <= targets, f"{page}: {named}"
            elif command := re.match(r"(?:\.venv/bin/)?steervit ([a-z]+)", named):
                assert command[1] in COMMANDS, f"{page}: {named}"
            else:
                continue
            seen += 1
    assert seen > 40
