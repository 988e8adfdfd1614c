"""The borders of the project: who may import what, and generated files that match their sources."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from processes import ROOT

from deploy.sbom import TARGETS
from export.bundle import Bundle
from service.cli_page import page
from service.demo import NEXT

FORBIDDEN = {
    "torch", "timm", "torchvision", "accelerate", "datasets", "webdataset", "scipy", "onnx", "onnxscript",
    "matplotlib", "jinja2", "tqdm", "starlette", "uvicorn", "opentelemetry", "fsspec", "s3fs", "huggingface_hub",
}  # fmt: skip
SCHEMAS = ROOT / "docs" / "schemas"
SERVING = [
    "service.__main__", "service.cli", "service.client", "service.demo", "service.server",
    "service.playground.__main__", "service.delivery.push", "service.delivery.pull", "export.bundle",
]  # fmt: skip


def test_serving_imports_nothing_that_the_base_install_lacks() -> None:
    code = (
        "import sys, importlib\n"
        f"for name in {sorted(FORBIDDEN)!r}: sys.modules[name] = None\n"
        f"for name in {SERVING!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("folder", "may_not"), [("training", {"export", "service"}), ("export", {"service"})])
def test_knowledge_flows_one_way(folder: str, may_not: set[str]) -> None:
    seen = 0
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                seen += 1
                assert name.split(".")[0] not in may_not, f"{path} imports {name}"
    assert seen > 10


ROOMS = ("data", "model", "vit", "sae", "profiles", "evaluation", "report")
"""Of training/, in the order in which a run goes through them."""
WHOLE = {"steps", "reproduce"}
"""The modules at the root of training/ that know all rooms; the others know none."""


def test_no_room_of_training_knows_a_later_one() -> None:
    folder = ROOT / "training"
    assert {path.parent.name for path in folder.glob("*/*.py")} == set(ROOMS)
    seen = set()
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0] if path.parent != folder else ""
        allowed = ROOMS if path.stem in WHOLE else ROOMS[: ROOMS.index(own) + 1] if own else ()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "training":
                continue
            _, *inner = (node.module or "").split(".")
            for name in inner[:1] or [alias.name for alias in node.names]:
                if name in ROOMS:
                    seen.add((own, name))
                    assert name in allowed, f"{path} imports training.{name}"
    assert ("report", "evaluation") in seen
    assert ("vit", "data") in seen


def test_generated_code_matches_the_proto_files(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-Iservice/pb=proto", f"--python_out={tmp_path}",
         f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}",
         "service/pb/steering.proto", "service/pb/open_inference.proto"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    for name in (
        f"{api}_{part}" for api in ("steering", "open_inference") for part in ("pb2.py", "pb2.pyi", "pb2_grpc.py")
    ):
        fresh, committed = tmp_path / "service" / "pb" / name, ROOT / "service" / "pb" / name
        assert fresh.read_text() == committed.read_text(), f"{name} is stale: make proto"


def test_the_schemas_are_what_the_classes_write(tmp_path: Path) -> None:
    for module in ("export.schemas", "service.serving_file"):
        subprocess.run([sys.executable, "-m", module, str(tmp_path)], cwd=ROOT, check=True)
    for name in ("manifest", "profiles", "serving"):
        fresh, committed = (folder / f"{name}.schema.json" for folder in (tmp_path, SCHEMAS))
        assert fresh.read_text() == committed.read_text(), f"{committed.name} is stale: make schemas"


def test_the_page_of_the_command_line_is_what_the_code_has() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == page(), "docs/cli.md is stale: make reference"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("manifest", {"schema_version": 1}),
        ("manifest", {"image": {"height": 28}}),
        ("manifest", {"labels": ["one"]}),
        (
            "profiles",
            {"profiles": [{"name": "x", "classes": [], "strategy": "", "terms": {"0": [{"latent": 1}]}}]},
        ),
    ],
)
def test_the_committed_bundle_is_valid_by_the_schemas_and_a_wrong_one_is_not(
    bundle: Bundle, name: str, wrong: dict[str, object]
) -> None:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    valid = json.loads((bundle.folder / f"{name}.json").read_text())
    assert Draft202012Validator(schema).is_valid(valid)
    assert not Draft202012Validator(schema).is_valid(valid | wrong)


def test_the_readme_names_only_files_and_targets_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for line in readme.splitlines() if line.strip().startswith("make ") for word in line.split()[1:2]}
    assert {"demo", "test"} <= targets
    for target in targets | set(re.findall(r"make (\w+)", NEXT)):
        assert f"\n{target}:" in makefile, target
    assert NEXT in readme, "README shows another end of make demo"


INSTEAD = {
    r"wanted|missed|aim|aims|aimed": "target, not met, required",
    r"wants": "needs",
    r"served no more": "unloaded",
    r"gets on": "makes progress",
    r"worked out": "computed",
    r"(?:tell|told) of": "log, report",
    r"waits? already|are \d+ to run": "queue full: N queued + M new > limit L",
    r"nobody waits for": "cancelled, expired",
    r"(?:listened on|be bound)": "cannot bind",
    r"says that it leaves": "reports NOT_SERVING",
    r"what is said of|taken to hang|hangs on|who wants": "a sentence that needs no second reading",
    r"goes? on|went on": "continues, resumes, keeps",
    r"under way": "in progress, in flight",
    r"of late": "recently",
    r"as one would": "plausibly, usually",
    r"(?:found|wanted|told|have) = ": "a noun: results, spec, payload",
}
"""Words that readers would stumble over, with what to write instead."""


def test_the_wording_of_what_people_read_is_plain() -> None:
    """Pages, comments of the API, alerts; comments and strings of the code and the tests: docstrings, help, errors, log
    lines."""
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "proto").iterdir()]
    pages += [path for suffix in ("*.md", "*.yaml") for path in (ROOT / "deploy").rglob(suffix)]
    texts = {str(path): path.read_text() for path in pages}
    folders = ("service", "export", "training", "deploy", "tests")
    for path in (path for name in folders for path in (ROOT / name).rglob("*.py")):
        if path == Path(__file__) or path.parent.name == "pb":
            continue
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts[f"{path}:{node.lineno}:{node.col_offset}"] = node.value
        texts[f"{path}: a comment"] = "\n".join(re.findall(r"(?:^|  )# .*", source, re.MULTILINE))
    assert len(texts) > 1000
    odd = re.compile("|".join(rf"\b(?:{words})" + r"\b" * (words[-1] != " ") for words in INSTEAD), re.I)
    found = {where: match[0] for where, text in texts.items() if (match := odd.search(text))}
    assert found == {}, f"{found}; INSTEAD has better words"


def test_the_readme_is_short_and_every_page_of_the_docs_is_in_the_sites_navigation() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    navigation = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    assert len(pages) > 5
    assert [page for page in pages if f": {page}\n" not in navigation] == []


@pytest.mark.parametrize(("data", "out"), [("fashion-mnist", "fm"), ("typefaces", "typefaces")])
def test_both_data_sets_are_reproduced_into_a_folder_of_their_own(data: str, out: str) -> None:
    plan = subprocess.run(
        ["make", "-n", "reproduce", f"DATA={data}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"-m training.reproduce --preset {data} --out runs/{out} --seeds 1" in plan.stdout
    assert f"-m export runs/{out}/seed-0 runs/{out}/models --name {data.replace('-', '_')}" in plan.stdout
    assert ("fonts-aenigma" in plan.stdout) == (data == "typefaces")


def test_the_architecture_page_names_only_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:training|export|service|tests|deploy|docs|proto)/[\w./-]*)", page))
    assert len(named) > 50
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_tags_of_images_have_the_projects_version() -> None:
    """Nodes keep a pulled image (IfNotPresent), so a tag must not move to another version."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [path for path in (ROOT / "deploy").rglob("*") if path.suffix == ".yaml" or path.name == "Dockerfile"]
    tags = {str(path): re.findall(r"(?:newTag: |\bsteervit:)([\w.-]+)", path.read_text()) for path in files}
    assert sum(map(len, tags.values())) >= 8
    for path, found in tags.items():
        assert set(found) <= {f"{version}-{target}" for target in TARGETS}, path
    built = subprocess.run(["make", "-n", "image"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f" -t steervit:{version}-cpu " in built


def test_the_table_of_results_is_what_the_committed_bundle_records(bundle: Bundle) -> None:
    """Every class and context: recall, precision, accuracy of all images, head usage and compute, as rounded there."""
    rows = {}
    for line in (ROOT / "docs" / "results.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in bundle.profiles and "→" in line:
            rows[cells[0]] = cells[1:6]
    assert set(rows) == set(bundle.profiles)
    for name, cells in rows.items():
        before, after = (bundle.profiles[name].evaluation[key] for key in ("before", "after"))
        assert cells == [
            *(f"{before[key]:.3f} → {after[key]:.3f}" for key in ("recall", "precision", "overall_accuracy")),
            *(f"{before[key]:.2f} → {after[key]:.2f}" for key in ("head_usage", "compute_fraction")),
        ]


def test_the_readme_of_the_tests_names_only_files_that_exist_and_every_one_at_the_top() -> None:
    tests = ROOT / "tests"
    head = (tests / "README.md").read_text().partition("# What can go wrong")[0]
    named = set(re.findall(r"[\w/*]+\.py", head))
    for name in named:
        assert any(any(folder.glob(name)) for folder in (tests, ROOT)), name
    covered = {path for name in named for path in tests.glob(name)}
    assert set(tests.glob("test_*.py")) <= covered
