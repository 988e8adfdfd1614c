"""The playground in a real Chromium, over real servers: what a user chooses, and what the page shows."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Page, chromium, playground
from masks import unit_mask
from processes import MODELS, ROOT, SAMPLES, ServerProcess, run_main, serving, start_server, stop_server, until
from selenium import webdriver
from selenium.webdriver.common.by import By

from service.client import AsyncClient, Client
from service.pb import steering_pb2 as pb
from service.playground.__main__ import main
from service.playground.asking import Question, ask
from service.playground.views import result_of

SHIRT = SAMPLES / "Shirt" / "00562.png"
STATIC = ROOT / "service" / "playground" / "static"
CHANGED = {"opened", "shut"}


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(driver: webdriver.Chrome, server: ServerProcess) -> Iterator[Page]:
    with playground(driver, server.address) as page:
        yield page


def expected_states(comparison: pb.Comparison) -> dict[tuple[str, int], str]:
    blocks = [str(of.block) for of in comparison.unsteered.head_mask]
    before, after = unit_mask([comparison.unsteered, comparison.steered])
    states = {(0, 0): "closed", (1, 1): "open", (0, 1): "opened", (1, 0): "shut"}
    return {(blocks[g], u): states[was, after[g, u]] for (g, u), was in np.ndenumerate(before)}


def test_from_an_upload_to_a_changed_map_of_the_heads(page: Page, client: Client) -> None:
    page.requested()
    page.open()
    page.shows("Ankle boot", "#result")  # the first sample is answered at once
    page.choose("No profile")
    page.upload(SHIRT)
    page.shows("Shirt (0.")
    assert not CHANGED & set(page.states().values())
    page.choose("Shirt")
    page.shows("either way")
    (comparison,) = client.compare([SHIRT.read_bytes()], profile="Shirt").comparisons
    assert page.states() == expected_states(comparison)
    assert set(page.states().values()) & CHANGED
    for side, words in ((comparison.unsteered, 2), (comparison.steered, 3)):
        assert page.text(f".facts tbody tr:first-child :nth-child({words})") == f"{side.compute_fraction:.3f}"
        best = side.classes[0]
        assert f"{best.probability:.3f} ✓" in page.text(f".pairs tbody tr:first-child :nth-child({words})")
    assert page.text("#announcement") == page.text("#summary")
    assert page.text(".latents tbody tr .push")
    assert page.one("#shown").get_attribute("src").startswith(f"blob:{page.url}")

    page.press("#strength", "HOME")  # by keyboard: no steering
    page.shows("Choose a profile")
    assert not CHANGED & set(page.states().values())
    assert {re.sub(r"^blob:", "", url)[: len(page.url)] for url in page.requested()} == {page.url}
    assert page.driver.get_log("browser") == []


async def test_a_default_budget_is_shown_as_the_budget() -> None:
    with serving(MODELS, "--default-budget", "0.6") as running:
        async with AsyncClient(running.address) as client:
            model, image = await client.model(), SHIRT.read_bytes()
            questions = Question(), Question(budget=0.8), Question(profile="Shirt", strength=0.0)
            by_default, own, off = [result_of(await ask(client, model, image, question)) for question in questions]
    assert by_default.settings == ("no profile, budget 0.60", "no profile, budget 0.60")
    assert own.settings == ("no profile, budget 0.60", "no profile, budget 0.80")
    assert by_default.dial
    assert by_default.dial.budget
    assert by_default.dial.caption.startswith("Budget 0.60, without steering: accuracy 0.9")
    assert off.dial == by_default.dial, "strength 0: the server takes the curve without steering"


def test_a_file_that_is_no_image_is_refused_in_a_sentence(page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "holiday.png"
    bad.write_text("not pixels")
    page.open()
    page.upload(bad)
    page.shows("The image is not a readable image (10 bytes", "#trouble")
    assert page.one("#trouble").aria_role == "alert"
    assert not page.states()
    page.one("input[value='Sneaker/00573.png']").find_element(By.XPATH, "..").click()
    page.shows("Sneaker")
    assert page.text("#trouble") == ""
    assert "sample=Sneaker%2F00573.png" in page.driver.current_url


def test_a_server_that_restarts_is_noticed_and_asked_again(driver: webdriver.Chrome) -> None:
    server = start_server(MODELS)
    with playground(driver, server.address) as page:
        page.open("?profile=Shirt")
        page.upload(SHIRT)
        page.shows("either way")
        expected = page.states()
        stop_server(server)
        page.press("#strength", "HOME")
        page.shows(f"The server at {server.address} does not answer. This page tries again", "#trouble")
        assert "The answer below is from before." in page.text("#trouble")
        assert page.states() == expected, "the last answer stays in sight"
        page.press("#strength", "ARROW_RIGHT", 20)
        with serving(MODELS, "--port", server.address.rpartition(":")[2]):
            until(lambda: page.text("#trouble") == "", 20)
            page.shows("either way")
            assert page.states() == expected
            assert page.one("#shown").get_attribute("src").startswith("blob:"), "still the uploaded image"
        page.open()
        page.shows("does not answer", "#trouble")


def test_the_page_fits_a_phone_and_each_control_has_a_name(page: Page) -> None:
    devtools = page.driver.execute_cdp_cmd
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    devtools("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.open("?sample=Shirt/00562.png&profile=Shirt")
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        nodes = devtools("Accessibility.getFullAXTree", {})["nodes"]
        controls = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if any(of["name"] == "focusable" and of["value"]["value"] for of in node.get("properties", ()))
            and node["role"]["value"] not in ("RootWebArea", "option")
        ]
        assert {"radio", "combobox", "slider", "button"} <= {role for role, _ in controls}
        assert [role for role, name in controls if not name] == []
        names = {node.get("name", {}).get("value", "") for node in nodes if node["role"]["value"] == "cell"}
        assert {"open", "closed", "closed by steering"} <= names
    finally:
        devtools("Emulation.clearDeviceMetricsOverride", {})


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_shapes_stand_out_in_both_schemes(scheme: int) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    blocks = re.findall(r":root \{([^}]*)\}", (STATIC / "playground.css").read_text())
    assert len(blocks) == 2
    colour = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[scheme]))
    for text, ground in (("text", "page"), ("text", "card"), ("muted", "page"), ("muted", "card"),
                         ("on-accent", "accent"), ("alarm-text", "alarm")):  # fmt: skip
        assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
    for shape in ("edge", "accent", "before", "open", "closed", "opened", "shut"):
        assert contrast(colour[shape], colour["card"]) >= 3, shape


def test_every_sample_of_a_folder_without_labels_is_on_the_page_by_its_name(
    driver: webdriver.Chrome, server: ServerProcess
) -> None:
    """62 files; 24 are in sight at once."""
    folder = ROOT / "deploy" / "typefaces" / "samples"
    with playground(driver, server.address, "--samples", str(folder)) as page:
        page.open()
        page.shows("compute", "#result")
        named = [
            found.get_attribute("textContent") for found in driver.find_elements(By.CSS_SELECTOR, ".sample .label")
        ]
        assert named == sorted(file.stem for file in folder.glob("*.png"))
        assert len([found for found in driver.find_elements(By.CSS_SELECTOR, ".sample") if found.is_displayed()]) == 24


def test_wrong_arguments_and_a_missing_extra_are_named() -> None:
    done = run_main(main, "--samples", "nowhere")
    assert (done.returncode, "--samples is nowhere; allowed: a folder" in done.stderr) == (2, True)
    blocked = "import sys; sys.modules['starlette.applications'] = None; from service.playground.__main__ import main"
    command = [sys.executable, "-c", f"{blocked}; sys.exit(main(['--server', '127.0.0.1:1']))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "which is not installed: pip install -e '.[playground]'" in done.stderr
