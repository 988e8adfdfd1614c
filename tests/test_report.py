"""The page matches results.json, is self-contained, and omits what a run lacks."""

import base64
import io
import json
import random
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import ROOT

from training.checkpoint import Run, RunError
from training.config import VitSettings
from training.data.splits import Split
from training.evaluation.criteria import MARGINS
from training.evaluation.latent_images import describe_latents
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.gated_vit import GatedVit
from training.model.inference import steered_by
from training.model.sae import Sae
from training.report import gate_figures
from training.report.dial_figures import frontier
from training.report.figures import kind_of, spread, trained_models
from training.report.write import oracle_at, page, shade, with_targets, write_report
from training.steering import SteeringProfile, SteeringTerm

LABELS = ["cat", "dog", "<eel>"]
OPTIONAL = {
    "diagnostics": "gates", "controls": "models", "last_block": "last", "pattern": "pattern", "seeds": "seeds",
    "latents": "latents", "success": "criteria",
}  # fmt: skip
"""Key of results.json -> id of its section."""
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
SETTINGS = {"seed": 3, "vit": {"usage_target": 0.5}}


def effect(draw: random.Random) -> dict[str, float]:
    names = ("recall", "precision", "f1", "false_positive_rate", "auroc", "others_accuracy", "overall_accuracy")
    return {name: round(draw.random(), 5) for name in (*names, "head_usage", "compute_fraction")}


def profile(draw: random.Random, name: str, classes: list[str]) -> dict[str, Any]:
    low = round(draw.uniform(-0.05, 0.0), 5)
    entry: dict[str, Any] = {
        "name": name, "classes": classes, "strategy": "learned", "terms": draw.randint(1, 99),
        "images": draw.randint(5, 2000), "before": effect(draw), "after": effect(draw),
        "recall_interval_before": [0.2, 0.4], "recall_interval_after": [0.3, 0.5],
        "recall_change_interval": [low, round(low + 0.04, 5)], "overall_change_interval": [-0.01, 0.01],
        "recall_p": 0.03, "prior_bias": {"recall": draw.random(), "precision": draw.random()},
        "head_usage_before": [[draw.random() for _ in range(3)] for _ in range(2)],
        "head_usage_after": [[draw.random() for _ in range(3)] for _ in range(2)],
        "power": {"discordance": 0.03, "power": 0.571, "detectable": 0.01362},
    }  # fmt: skip
    if len(classes) == 1:
        entry |= {"recall_p_adjusted": draw.random(), "other_profiles": {"recall": 0.4, "head_usage": 0.3}}
    return entry


def rival(draw: random.Random) -> dict[str, Any]:
    names = ("recall", "precision", "others_accuracy", "auroc", "worst_recall")
    against = {"recall": draw.uniform(-0.1, 0.1), "interval": [-0.0125, 0.031], "p": draw.random()}
    changes = {name: round(draw.uniform(-0.3, 0.1), 5) for name in names}
    return {"head_usage": round(draw.random(), 5), **changes, "against_profile": against}


def told_no_class(draw: random.Random, **intervals: tuple[float, float]) -> dict[str, Any]:
    """A steering that is the same for all images; intervals: of what the class adds to it, by metric."""
    adds = {metric: intervals.get(metric, (-0.01, 0.03)) for metric in MARGINS}
    return {
        **effect(draw),
        "adds": {m: {"change": (low + high) / 2, "interval": [low, high]} for m, (low, high) in adds.items()},
    }


def results_of(seed: int) -> dict[str, Any]:
    """A complete results.json with random numbers and all optional parts."""
    draw = random.Random(seed)
    whole = {"accuracy": 0.8125, "head_usage": 0.51234, "compute_fraction": 0.87654}
    profiles = [profile(draw, label, [label]) for label in LABELS]
    names = ("no steering", "gate-logit bias", "random", "learned", "learned, random latents", "causal")
    oracle = [{"head_usage": k / 3, "recall": round(0.3 * k, 5), "heads": list(range(k))} for k in range(4)]
    criteria = [
        {"criterion": "mean recall change >= -0.5 point", "measured": -0.0125, "met": False},  # of an older run
        {"criterion": "recall", "measured": -0.017, "met": False, "verdict": "not shown", "p": 0.31, "classes": 2},
    ]
    image = {"png": PIXEL, "label": "dog", "activation": 1.25}
    term = {
        "site": 1, "block": 2, "latent": 41, "scale": 0.5, "shift": -1.25, "effect": [0.125, -2.5, 0.0],
        "mean": {"target": 1.5, "rest": 0.25}, "active": {"target": 0.75, "rest": 0.5}, "images": [image] * 3,
    }  # fmt: skip
    return {
        "split": "test", "images": 3000, "labels": LABELS, "gated_blocks": [1, 2],
        "ungated": whole, "neutral": whole, "by_predicted_class": whole,
        "profiles": [*profiles, profile(draw, "mammals", ["cat", "dog"])],
        "mean_change": {key: round(draw.uniform(-0.1, 0.1), 5) for key in effect(draw)},
        "mean_after": effect(draw),
        "class_agnostic": {
            "one bias for all": told_no_class(draw, recall=(0.002, 0.01), precision=(-0.02, -0.005)),
            "the dial alone": told_no_class(draw, recall=(0.001, 0.004), auroc=(0.0005, 0.0015)),
        },
        "rivals": {name: rival(draw) for name in names}, "success": criteria,
        "diagnostics": {"usage": [p["head_usage_before"] for p in profiles], "near_threshold": [[0.1, 0.2, 0.0]] * 2},
        "controls": {
            name: {
                "what": f"A {name} model.", "accuracy": draw.random(), "head_usage": draw.random(),
                "compute_fraction": draw.random(), "recall": [draw.random() for _ in LABELS],
                "precision": [draw.random() for _ in LABELS],
            }
            for name in ("dense", "direct")
        },
        "last_block": {
            "neutral": whole, "profiles": [profile(draw, label, [label]) for label in LABELS],
            "mean_change": effect(draw), "success": criteria, "rivals": {name: rival(draw) for name in names[:3]},
            "oracle": dict.fromkeys(LABELS, oracle),
        },
        "pattern_definition": "Half the heads, and recall up.",
        "pattern": [{
            "name": "dog", "usage": [0.6, 0.2], "recall": [0.71, 0.775], "p": 0.0004, "p_adjusted": 0.012,
            "precision": [0.9, 0.85], "prior_bias_recall": 0.7375,
        }],
        "seeds": [
            {
                "seed": s, "ungated": draw.random(), "neutral_accuracy": draw.random(), "neutral_usage": draw.random(),
                "usage": draw.random(), "recall_change": draw.uniform(-0.1, 0.1), "worst_recall_change": -0.1,
                "overall_change": -0.02, "precision_change": 0.031, "rivals": {"random": rival(draw)},
                **({"static": {"accuracy": 0.9, "dial_difference": 0.01 * s}} if s else {}),
            }
            for s in range(3)
        ],
        "intervals": {"recall": [-0.005, 0.01], "precision": [-0.02, -0.001], "overall_accuracy": [0.0, 0.003]},
        "dial_intervals": {"static": [-0.01, 0.04]}, "dial_seeds": {"static": [1, 2]},
        "latents": [{"name": "dog", "classes": ["dog"], "images": 40, "terms_in_all": 9, "terms": [term, term]}],
    }  # fmt: skip


def quality(draw: random.Random) -> dict[str, float]:
    names = ("l0", "fvu", "cosine", "dead", "dense", "gate_agreement", "gate_agreement_clear")
    return {name: draw.random() for name in names}


def sae_of(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    names = ("accuracy", "accuracy_reconstructed", "ce", "ce_reconstructed", "ce_mean", "ce_recovered")
    return {
        "sites": [1, 2], "latents": 64, "fidelity": [quality(draw), quality(draw)],
        "fidelity_before": [quality(draw), quality(draw)], "recovered": {name: draw.random() for name in names},
        "stability": [[0.75, 0.5]],
    }  # fmt: skip


def with_groups(value: Any, draw: random.Random) -> Any:
    """The same results of a model with two MLP groups a block."""
    if isinstance(value, list):
        return [with_groups(entry, draw) for entry in value]
    if not isinstance(value, dict):
        return value
    found = {key: with_groups(entry, draw) for key, entry in value.items()}
    if "head_usage" in value and "heads" not in value:
        found |= {"mlp_usage": round(draw.random(), 5), "unit_usage": round(draw.random(), 5)}
    if "head_usage_before" in value:
        found |= {f"mlp_usage_{when}": [[draw.random(), 0.5] for _ in range(2)] for when in ("before", "after")}
    if "usage" in value and "near_threshold" in value:
        found |= {
            key: np.pad(value[key], [*[(0, 0)] * axes, (0, 2)]).tolist()
            for key, axes in (("usage", 2), ("near_threshold", 1))
        }
    if "scale" in value:
        found["effect"] = [*value["effect"], 0.5, -0.5]
    return found


class Reader(HTMLParser):
    """Tables by the id of their section (rows of cell texts, captions left out), and what every tag carries."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = defaultdict(list)
        self.captions: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.section, self.cell, self.caption = "", False, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        match tag:
            case "h2":
                self.section = dict(attrs)["id"] or ""
            case "table":
                self.tables[self.section].append([])
            case "tr":
                self.tables[self.section][-1].append([])
            case "td" | "th":
                self.cell = True
                self.tables[self.section][-1][-1].append("")
            case "caption":
                self.caption = True
                self.captions.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell, cells = False, self.tables[self.section][-1][-1]
            cells[-1] = " ".join(cells[-1].split()).replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "none")
        self.caption = self.caption and tag != "caption"

    def handle_data(self, data: str) -> None:
        if self.caption:
            self.captions[-1] += data
        elif self.cell:
            self.tables[self.section][-1][-1][-1] += data


def read(results: dict[str, Any], seed: int = 0) -> tuple[str, Reader]:
    text = page(results, sae_of(seed), SETTINGS, defaultdict(lambda: PIXEL))
    return text, Reader(text)


def signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def point(value: float) -> str:
    return signed(100 * value, 1)


def chance(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def pair(p: dict[str, Any], field: str, digits: int = 3) -> str:
    return f"{p['before'][field]:.{digits}f} → {p['after'][field]:.{digits}f}"


def change(p: dict[str, Any], field: str) -> str:
    return point(p["after"][field] - p["before"][field])


def recall_cell(p: dict[str, Any]) -> str:
    low, high = p["recall_change_interval"]
    return f"{change(p, 'recall')} [{point(low)}, {point(high)}]"


def rival_cells(rivals: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [name, f"{v['head_usage']:.3f}", point(v["recall"]), point(v["worst_recall"]), point(v["precision"]),
         point(v["others_accuracy"]), signed(v["auroc"], 4),
         f"{point(v['against_profile']['recall'])} [-1.2, +3.1]", chance(v["against_profile"]["p"])]
        for name, v in sorted(rivals.items(), key=lambda item: item[1]["head_usage"])
    ]  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_every_number_of_the_tables_is_that_of_results_json(seed: int) -> None:
    r, sae = results_of(seed), sae_of(seed)
    tables = read(r, seed)[1].tables

    def row(p: dict[str, Any]) -> list[str]:
        return [
            p["name"], f"{p['images']:,}", p["strategy"], str(p["terms"]), pair(p, "head_usage", 2),
            pair(p, "compute_fraction", 2), pair(p, "recall"), recall_cell(p),
            chance(p["recall_p_adjusted"]) if "recall_p_adjusted" in p else "none", pair(p, "precision"),
            change(p, "precision"), pair(p, "auroc"), change(p, "others_accuracy"), change(p, "overall_accuracy"),
        ]  # fmt: skip

    m = r["mean_change"]
    means = ["mean change", "", "", "", signed(m["head_usage"], 2), signed(m["compute_fraction"], 2), "",
             point(m["recall"]), "", "", point(m["precision"]), signed(m["auroc"], 4), point(m["others_accuracy"]),
             point(m["overall_accuracy"])]  # fmt: skip
    *singles, context = r["profiles"]
    assert tables["classes"][0][1:] == [*map(row, singles), means, row(context)]

    assert tables["pattern"][0][1:] == [
        ["dog", "0.60 → 0.20", "0.710 → 0.775", "+6.5", "0.738", "< 0.001", "0.012", "0.900 → 0.850", "-5.0"]
    ]
    assert tables["criteria"][0][1:] == [
        ["mean recall change >= -0.5 point", "-0.0125", "NO"],
        ["recall", "-0.017", "not shown (shown in 2; largest p 0.310)"],
    ]
    assert [[name, *numbers] for name, _, *numbers in tables["rivals"][0][1:]] == rival_cells(r["rivals"])

    *_, (_, after, *alike) = tables["rivals"]
    metrics = ("recall", "precision", "auroc", "overall_accuracy")
    for cells, v in zip((after, *alike), (r["mean_after"], *r["class_agnostic"].values()), strict=True):
        usage = f"{v['head_usage']:.3f}", f"{v['compute_fraction']:.3f}"
        assert cells[1:7] == [*usage, *(f"{v[metric]:.4f}" for metric in metrics)]
    assert alike[0][7:] == ["+0.60 [+0.20, +1.00]", "-1.25 [-2.00, -0.50]", *["+1.00 [-1.00, +3.00]"] * 2]

    def mean_of(values: list[float]) -> str:
        return f"{sum(values) / len(values):.3f}"

    models = [
        [name, c["what"], f"{c['accuracy']:.3f}", f"{c['head_usage']:.3f}", f"{c['compute_fraction']:.3f}",
         mean_of(c["recall"]), mean_of(c["precision"])]
        for name, c in r["controls"].items()
    ]  # fmt: skip
    assert tables["models"][0][1:3] == models
    for cells, when in ((tables["models"][0][3], "before"), (tables["models"][0][4], "after")):
        assert cells[-2:] == [mean_of([p[when][field] for p in singles]) for field in ("recall", "precision")]
    assert tables["models"][1][1:] == [
        [p["name"], f"{p['before']['recall']:.3f}", f"{p['after']['recall']:.3f}",
         *(f"{c['recall'][index]:.3f}" for c in r["controls"].values())]
        for index, p in enumerate(singles)
    ]  # fmt: skip

    last = r["last_block"]
    for cells, p in zip(tables["last"][0][1:], last["profiles"], strict=True):
        kept = next(k for k in range(4) if k / 3 >= p["after"]["head_usage"])
        assert cells == [
            p["name"], str(p["terms"]), pair(p, "head_usage", 2), pair(p, "recall"), recall_cell(p),
            chance(p["recall_p_adjusted"]), pair(p, "precision"), change(p, "overall_accuracy"),
            f"{kept / 3:.2f}", f"{0.3 * kept:.3f}", " ".join(f"h{head}" for head in range(kept)),
        ]  # fmt: skip
    assert [[name, *numbers] for name, _, *numbers in tables["last"][1][1:]] == rival_cells(last["rivals"])

    latent = ["2, 41", "0.50", "-1.25", "+0.12", "-2.50", "0.00", "1.5075%", "0.2550%", "dog1.25dog1.25dog1.25"]
    assert tables["latents"][0][1] == latent

    def site(index: int, field: str, digits: int, factor: int = 1, unit: str = "") -> str:
        both = (sae[key][index][field] * factor for key in ("fidelity_before", "fidelity"))
        return " → ".join(f"{value:.{digits}f}{unit}" for value in both)

    assert tables["sae"][0][1:] == [
        [str(sae["sites"][i]), site(i, "l0", 1), site(i, "fvu", 4), site(i, "cosine", 4), site(i, "dead", 1, 100, "%"),
         site(i, "dense", 1, 100, "%"), site(i, "gate_agreement", 2, 100, "%"),
         site(i, "gate_agreement_clear", 2, 100, "%"), f"{sae['stability'][0][i]:.3f}"]
        for i in range(2)
    ]  # fmt: skip

    shares = ("ungated", "neutral_accuracy", "neutral_usage", "usage")
    moved = ("recall_change", "worst_recall_change", "precision_change", "overall_change")
    *of_seeds, over, interval = tables["seeds"][0][1:]
    assert interval == ["95%", "", "", "", "", "[-0.5, +1.0]", "", "[-2.0, -0.1]", "[0.0, +0.3]"]
    assert of_seeds == [
        [str(s["seed"]), *(f"{s[k]:.3f}" for k in shares), *(point(s[k]) for k in moved)] for s in r["seeds"]
    ]
    usage = np.array([s["usage"] for s in r["seeds"]])
    assert over[4] == f"{usage.mean():.3f} ± {usage.std(ddof=1):.3f}"
    of_random = [s["rivals"]["random"] for s in r["seeds"]]
    assert tables["seeds"][1][1] == ["static", "none", "+1.00", "+2.00", "2 of 3", "+1.50", "[-1.00, +4.00]"]
    assert tables["seeds"][2][1] == ["random", *(f"{point(v['recall'])} ({v['head_usage']:.2f})" for v in of_random)]


def test_what_the_class_adds_is_said_whichever_way_it_falls() -> None:
    results = results_of(4)
    said = " ".join(read(results)[0].split()).replace("\N{MINUS SIGN}", "-")
    assert (
        "higher recall (+0.60 [+0.20, +1.00]); lower precision (-1.25 [-2.00, -0.50]); no shown difference in AUROC "
        "(+1.00 [-1.00, +3.00]), accuracy of all images (+1.00 [-1.00, +3.00])."
    ) in said
    assert "So knowing the class improves recall over all of them." in said
    results["class_agnostic"]["the dial alone"] = told_no_class(random.Random(0), recall=(-0.01, -0.002))
    said = " ".join(read(results)[0].split())
    assert "So knowing the class is not shown to improve any of these metrics over all of them." in said
    del results["class_agnostic"]
    assert "nowing the class" not in read(results)[0]


def test_the_page_is_self_contained_and_labels_each_table_and_picture() -> None:
    text, reader = read(results_of(1))
    assert text.lstrip().startswith("<!doctype html>")
    assert not re.search(r"https?:|url\(|@import", text)
    assert {tag for tag, _ in reader.attributes}.isdisjoint({"script", "link", "iframe", "object"})
    images = [attributes for tag, attributes in reader.attributes if tag == "img"]
    assert len(images) == 9 + 6 - 1  # latents.png is a file alone: the page has its images one by one
    for attributes in images:
        assert (attributes["src"] or "").startswith("data:image/png;base64,")
        assert attributes["alt"]
    assert len(reader.captions) == sum(map(len, reader.tables.values()))
    assert all(re.search(r"split", caption) and re.search(r"\d", caption) for caption in reader.captions)
    assert "<eel>" not in text
    assert reader.tables["classes"][0][3][0] == "<eel>"


@pytest.mark.parametrize("lacking", [*OPTIONAL, tuple(OPTIONAL)])
def test_missing_results_leave_no_heading_and_no_entry_in_the_contents(lacking: str | tuple[str, ...]) -> None:
    missing = (lacking,) if isinstance(lacking, str) else lacking
    text, reader = read({key: value for key, value in results_of(2).items() if key not in missing})
    found = [attributes["id"] for tag, attributes in reader.attributes if tag == "h2"]
    linked = [(a["href"] or "")[1:] for tag, a in reader.attributes if tag == "a"]
    pictures = [attributes["id"] for tag, attributes in reader.attributes if tag == "figure"]
    assert [*found, *pictures] == linked
    assert {OPTIONAL[key] for key in missing}.isdisjoint(found)
    assert {part for key, part in OPTIONAL.items() if key not in missing} < set(found)
    for body in re.split(r"<h2[^>]*>", text)[1:]:
        assert len(re.sub(r"<[^>]*>", "", body.split("</h2>", 1)[1]).strip()) > 40
    assert "Undefined" not in text


def test_the_power_is_shown_below_the_criteria_except_for_older_runs() -> None:
    text = " ".join(read(results_of(2))[0].split())
    assert "3.0 to 3.0% become right or wrong, show a margin of one point with a probability of 57.1 to 57.1%" in text
    assert "with 80% they show a margin of 1.4 to 1.4 points" in text
    older = results_of(2)
    del older["intervals"]
    for entry in [*older["profiles"], *older["last_block"]["profiles"]]:
        del entry["power"]
    text, reader = read(older)
    assert "Power of the test" not in text
    assert len(reader.tables["seeds"][0]) == 1 + 3 + 1


def test_mlp_groups_stand_beside_heads() -> None:
    r = with_groups(results_of(6), random.Random(6))
    text, reader = read(r)
    classes, rivals = reader.tables["classes"][0], reader.tables["rivals"][0]
    assert classes[0][4:7] == ["head usage", "MLP usage", "compute"]
    first = r["profiles"][0]
    assert classes[1][4:7] == [pair(first, name, 2) for name in ("head_usage", "mlp_usage", "compute_fraction")]
    assert classes[4][4:6] == [signed(r["mean_change"][name], 2) for name in ("head_usage", "mlp_usage")]
    assert rivals[0][2:5] == ["unit usage", "heads", "MLP groups"]
    by_usage = sorted(r["rivals"].items(), key=lambda item: item[1]["unit_usage"])
    assert [cells[0] for cells in rivals[1:]] == [name for name, _ in by_usage]
    usages = [[f"{v[name]:.3f}" for name in ("unit_usage", "head_usage", "mlp_usage")] for _, v in by_usage]
    assert [cells[2:5] for cells in rivals[1:]] == usages
    assert reader.tables["latents"][0][0][3:8] == ["h0", "h1", "h2", "m0", "m1"]
    mean = sum(p["after"]["unit_usage"] for p in r["profiles"][:3]) / 3
    assert f"→ {mean:.2f}</b>unit usage on a class's images" in text
    before, after, *bars = gate_figures.heads(r).axes
    for axis in (before, after):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2", "0", "1"] * 2
        heads, groups = (image.get_array() for image in axis.images)
        assert (~heads.mask).sum() == 4 * 2 * 3
        assert (heads.mask == ~groups.mask).all()
    assert [bar.get_ylabel() for bar in bars] == [f"share of images that keep the {u}" for u in ("MLP group", "head")]
    assert after.images[1].get_array()[1, 3] == r["profiles"][1]["mlp_usage_after"][0][0]
    assert [axis.get_ylabel() for axis in gate_figures.usage_per_block(r).axes] == ["head usage", "MLP usage"]
    assert len(gate_figures.gates(r).axes[0].get_xticklabels()) == 5


def test_a_model_that_spends_less_than_the_dial_can_is_named() -> None:
    r = results_of(7)
    point = {"budget": 0.5, "compute_fraction": 0.5, "compute_of_classes": [0.4, 0.6], "head_usage": 0.3, "accuracy": 1}
    r["dial"] = {"test": {"": [point]}, "largest_error": {"": 0.001}}
    against = {"difference": -0.005, "standard_error": 0.001, "p": 0.98, "margin": 0.002, "verdict": "not met"}
    dense = r["controls"]["dense"]
    r["controls"] = {
        "dense": dense | {"dial_at_its_compute": against}, "plain-40": dense | {"compute_fraction": 0.38}
    }  # fmt: skip
    text, reader = read(r)
    assert [cells[0] for cells in reader.tables["dial"][1][1:]] == ["dense"]
    assert "so without a comparison: plain-40 (0.380)." in text


def test_no_class_with_the_pattern_is_said_in_words() -> None:
    text, _ = read({**results_of(2), "pattern": []})
    assert "0 of 3" in text
    assert "No class of this run meets it." in text


def test_the_run_folder_holds_the_page_and_its_pictures(tmp_path: Path) -> None:
    run, results = Run(tmp_path), results_of(4)
    curves = [
        {"phase": phase, "step": step, "accuracy": 0.5, "usage": 0.9}
        for phase in ("backbone", "gates", "joint")
        for step in (0, 20, 39)
    ]
    run.finish("vit", SETTINGS, {"curves": curves})
    run.finish("sae", SETTINGS, sae_of(4))
    with pytest.raises(RunError, match=r"results\.json is missing: run the step 'evaluate' first"):
        write_report(run)
    run.write_json("results.json", results)
    write_report(run)
    text = (tmp_path / "report.html").read_text()
    names = {"effects", "precision", "frontier", "heads", "usage", "gates", "last_block", "latents", "curves"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    for name in names:
        content = (tmp_path / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert min(image.size) > 200
        assert (base64.b64encode(content).decode() in text) == (name != "latents")
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_curves_show_the_usage_that_was_asked_for() -> None:
    points = [{"phase": "gates", "step": 0}, *({"phase": "joint", "step": step} for step in (0, 30, 60, 99))]
    # 1 -> 0.5 over the first 60% of 100 steps
    assert [point.get("target") for point in with_targets(points, 0.5)] == [None, 1.0, 0.75, 0.5, 0.5]


def test_random_units_far_below_do_not_squeeze_the_frontier() -> None:
    results = json.loads((ROOT / "training" / "results" / "typefaces-dial.json").read_text())
    (axis,) = frontier(results).axes
    least = min(point["accuracy"] for point in results["dial"]["random"])
    assert least < 0.4
    assert axis.get_ylim()[0] > 100 * (results["dial"]["test"][""][0]["accuracy"] - 0.1)
    assert f"x {100 * least:.1f}" in [text.get_text() for text in axis.texts]


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(0.1, 4))
def test_labels_of_the_frontier_never_overlap(values: list[float], gap: float) -> None:
    placed = spread(sorted(values), gap, -60, 60)
    assert (np.diff(placed) >= gap - 1e-6).all()
    assert placed[0] >= -60 - 1e-6
    assert placed[-1] <= 60 + 1e-6
    if len(values) == 1 or np.diff(sorted(values)).min() >= gap:
        np.testing.assert_allclose(placed, sorted(values), atol=1e-6)


def test_models_trained_apart_are_compared_by_hand() -> None:
    whole = {"recall": 0.5, "others_accuracy": 0.5}
    profiles = [{"classes": [label], "images": n, "before": whole} for label, n in (("a", 10), ("b", 30), ("c", 10))]
    control = {"compute_fraction": 0.8, "head_usage": 1.0, "recall": [1.0, 0.5, 0.0]}
    (found,) = trained_models({"profiles": profiles, "labels": ["a", "b", "c"], "controls": {"small": control}})
    assert found["recall"] == 0.0
    # the others of a: (15 + 0) / 40, of b: (10 + 0) / 20, of c: (10 + 15) / 40
    assert found["others_accuracy"] == pytest.approx((0.375 + 0.5 + 0.625) / 3 - 0.5)


def test_kinds_oracle_and_shades() -> None:
    names = ("causal", "learned", "learned, random latents", "random", "random heads", "profile")
    kinds = ["strategy", "strategy", "control", "control", "baseline", "profile"]
    assert (kind_of("another class's profile"), kind_of("gate-logit bias")) == ("control", "baseline")
    assert [kind_of(name) for name in names] == kinds
    best = [{"head_usage": k / 4, "heads": list(range(k))} for k in range(5)]
    assert oracle_at(best, 0.25)["heads"] == [0]
    assert oracle_at(best, 0.26)["heads"] == [0, 1]
    background, text = shade(0.0, 1.0)
    assert (int(background[1:3], 16) > 240, text) == (True, "#222222")
    assert shade(-5.0, 1.0) == shade(-1.0, 1.0) != shade(1.0, 1.0)
    assert shade(1.0, 1.0)[1] == "#ffffff"


def test_a_terms_effect_is_what_the_network_does_under_that_term_alone() -> None:
    torch.manual_seed(0)
    spec = ImageSpec(16, 16, 3, 16, "bicubic", (0.3,) * 3, (0.4,) * 3)
    model = GatedVit(create_vit(VitSettings(dim=24, depth=3, heads=3), spec, 3), (1, 2), spec)
    for gate in model.gates:
        torch.nn.init.normal_(gate.linear.weight, std=0.3)
    model.eval().requires_grad_(False)
    sae = Sae(2, 10, 24).requires_grad_(False)
    for name, value in sae.named_parameters():
        torch.nn.init.normal_(value, std=0.0 if name == "threshold" else 0.3)
    split = Split(torch.randint(256, (30, 16, 16, 3), dtype=torch.uint8), torch.arange(30) % 3)
    sae.encoder_bias.zero_()
    sae.decoder_bias.copy_(model(split.images)[1]["residual"].mean(0))  # so that each latent is silent on some images
    terms = {
        0: (SteeringTerm(4, 0.0, 1.0), SteeringTerm(7, 1.0, 0.0), SteeringTerm(1, 3.0, 0.5)),
        1: (SteeringTerm(2, 1.0, -2.0),),
    }
    profiles = [SteeringProfile("dog", ("dog",), "learned", terms), SteeringProfile("cat", ("cat",), "learned", {})]
    (found,) = describe_latents(model, sae, profiles, split, LABELS, per_profile=3, images=4)
    assert (found["name"], found["images"], found["terms_in_all"]) == ("dog", 10, 4)
    sizes = [sum(map(abs, term["effect"])) for term in found["terms"]]
    assert sizes == sorted(sizes, reverse=True)
    assert 7 not in [term["latent"] for term in found["terms"]]  # the neutral term moves nothing
    own, neutral = split.classes == 1, model(split.images)[1]
    assert any(term["images"] for term in found["terms"])
    for term in found["terms"]:
        site, latent = term["site"], term["latent"]
        assert term["block"] == (1, 2)[site]
        alone = {site: tuple(t for t in terms[site] if t.latent == latent)}
        steered = model(split.images, steered_by(sae, alone))[1]
        expected = (steered["gate_logit"] - neutral["gate_logit"])[own, site].mean(0)
        torch.testing.assert_close(torch.tensor(term["effect"]), expected, rtol=0, atol=2e-4)
        z = sae.encode(site, neutral["residual"][:, site])[:, latent]
        assert term["mean"]["rest"] == pytest.approx(z[~own].mean().item(), abs=1e-4)
        assert term["active"]["target"] == pytest.approx((z[own] > 0).float().mean().item(), abs=1e-4)
        order = z.argsort(descending=True)[: len(term["images"])].tolist()
        assert len(order) == min(4, int((z > 0).sum()))
        for index, shown in zip(order, term["images"], strict=True):
            assert shown["label"] == LABELS[index % 3]
            assert shown["activation"] == pytest.approx(z[index].item(), abs=1e-4)
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown["png"]))))
            assert np.array_equal(pixels, split.images[index].numpy())
