"""Answers as the page shows them: rows of tables and cells of the map. The templates only draw."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from service.pb import steering_pb2 as pb
from service.playground.asking import Answers
from service.playground.dial import DialView, dial_of

MOST_CLASSES, MOST_ROWS, MOST_PUSHES = 5, 12, 3
"""Limits of what is shown: classes of each answer, latents, and units named in the row of a latent."""
STATES = ("open", "closed", "opened", "shut")


@dataclass(frozen=True)
class ClassRow:
    """A class that is among the most probable of either answer."""

    label: str
    before: float
    after: float
    first: tuple[bool, bool]
    """Whether it is the most probable one, without steering and with it."""


@dataclass(frozen=True)
class Fact:
    """A number of both answers."""

    name: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Cell:
    """A unit in the map: head or MLP group."""

    unit: str
    state: str
    """One of STATES: open or closed in both answers; opened or shut by what the question asks for."""


@dataclass(frozen=True)
class LatentRow:
    """A latent and what it adds to the gate logits of its block."""

    block: int
    latent: int
    value: float
    steered: float
    pushes: tuple[float, ...]
    """The push on each unit: above 0 towards open."""
    strongest: tuple[str, ...]
    """The units that it pushes most, in words."""


@dataclass(frozen=True)
class Result:
    """Everything that the page shows of an answer."""

    summary: str
    names: tuple[str, str]
    settings: tuple[str, str]
    classes: tuple[ClassRow, ...]
    facts: tuple[Fact, ...]
    compute: tuple[float, float]
    cause: str
    units: tuple[str, ...]
    heads: int
    blocks: tuple[tuple[int, tuple[Cell, ...]], ...]
    counts: dict[str, int]
    """Units by state."""
    latents: tuple[LatentRow, ...]
    steered_latents: int
    """Number of steered latents; 0: none is, and the rows show the strongest ones."""
    largest_push: float
    dial: DialView | None
    record: str
    """The measured effect of the profile; empty: no profile, or not measured."""
    ran: str
    brownout: str


def result_of(answers: Answers) -> Result:
    """What the page shows of the answers."""
    question, receipt = answers.question, answers.receipt
    before, after = answers.predictions
    blocks = tuple(_blocks(before, after))
    every = [cell.state for _, cells in blocks for cell in cells]
    counts = {state: every.count(state) for state in STATES}
    rows, steered = _latents(answers, blocks)
    settings = ["no profile", "no profile"]
    if question.profile:
        settings[1] = f"profile {question.profile}, strength {question.strength:g}"
    if answers.model.dial:
        for index, budget in enumerate(answers.budgets):
            settings[index] += ", no budget" if budget is None else f", budget {budget:.2f}"
    ran = f"{receipt.model} version {receipt.version}, graph {receipt.graph}, bundle {receipt.bundle_digest}"
    return Result(
        summary=_summary(answers, counts),
        names=("Unsteered", "At the budget" if question.budget is not None and not question.profile else "Steered"),
        settings=(settings[0], settings[1]),
        classes=tuple(_classes(before, after)),
        facts=tuple(_facts(answers)),
        compute=(before.compute_fraction, after.compute_fraction),
        cause=question.cause,
        units=tuple(cell.unit for cell in blocks[0][1]),
        heads=answers.model.heads,
        blocks=blocks,
        counts=counts,
        latents=tuple(rows),
        steered_latents=steered,
        largest_push=max((abs(push) for row in rows for push in row.pushes), default=0.0),
        dial=dial_of(answers),
        record=_record(answers.profile),
        ran=f"{ran}, steering {receipt.steering_digest}" if receipt.steering_digest else ran,
        brownout=f"The busy server lowered the budget to {receipt.budget_applied:.2f}." if receipt.brownout else "",
    )


def signed(value: float, digits: int = 2) -> str:
    """The number with its sign; the minus is as wide as the plus."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text[1:]


def _summary(answers: Answers, counts: Mapping[str, int]) -> str:
    question, predictions = answers.question, answers.predictions
    (label, p), (other, q) = ((each.classes[0].label, each.classes[0].probability) for each in predictions)
    x, y = (each.compute_fraction for each in predictions)
    if not question.steers and question.budget is None:
        return f"{label} ({p:.2f}), at {x:.2f} of the compute. Choose a profile to steer the gates."
    if label == other:
        classes = f"{label} either way ({p:.2f} → {q:.2f})."
    else:
        classes = f"{label} ({p:.2f}) unsteered, {other} ({q:.2f}) with {question.cause}."
    opened, shut = (f"{counts[state]} unit{'s' * (counts[state] != 1)}" for state in ("opened", "shut"))
    return f"{classes} Compute {x:.2f} → {y:.2f}: {opened} opened, {shut} closed."


def _classes(before: pb.Prediction, after: pb.Prediction) -> Iterator[ClassRow]:
    of = [{each.label: each.probability for each in answer.classes} for answer in (before, after)]
    shown = {each.label for answer in (before, after) for each in answer.classes[:MOST_CLASSES]}
    for label in sorted(shown, key=lambda label: -max(of[0][label], of[1][label])):
        first = (label == before.classes[0].label, label == after.classes[0].label)
        yield ClassRow(label, of[0][label], of[1][label], first)


def _facts(answers: Answers) -> Iterator[Fact]:
    before, after = answers.predictions
    x, y = before.compute_fraction, after.compute_fraction
    yield Fact("Compute fraction", f"{x:.3f}", f"{y:.3f}", signed(y - x, 3))
    heads, groups = ([p.head_mask for p in (before, after)], [p.mlp_mask for p in (before, after)])
    for name, masks in (("Heads open", heads), ("MLP groups open", groups)):
        if of := sum(len(block.kept) for block in masks[0]):
            a, b = (sum(sum(block.kept) for block in mask) for mask in masks)
            yield Fact(name, f"{a} of {of}", f"{b} of {of}", signed(b - a, 0))
    slow, fast = (1000 * value for value in answers.seconds)
    yield Fact("Inference, ms", f"{slow:.2f}", f"{fast:.2f}", signed(fast - slow))


def _blocks(before: pb.Prediction, after: pb.Prediction) -> Iterator[tuple[int, tuple[Cell, ...]]]:
    """The cells of each gated block: heads, then MLP groups."""
    for index, heads in enumerate(before.head_mask):
        cells = [
            Cell(f"head {unit}", _state(a, b))
            for unit, (a, b) in enumerate(zip(heads.kept, after.head_mask[index].kept, strict=True))
        ]
        if before.mlp_mask:
            pairs = zip(before.mlp_mask[index].kept, after.mlp_mask[index].kept, strict=True)
            cells += [Cell(f"MLP group {unit}", _state(a, b)) for unit, (a, b) in enumerate(pairs)]
        yield heads.block, tuple(cells)


def _state(before: bool, after: bool) -> str:
    if before == after:
        return "open" if after else "closed"
    return "opened" if after else "shut"


def _latents(answers: Answers, blocks: Sequence[tuple[int, Sequence[Cell]]]) -> tuple[list[LatentRow], int]:
    """The steered latents that push the gates most, and the number of steered ones. If none is steered: the active
    latents with what they add by themselves, and 0."""
    plain, steered = ([(site, latent) for site in e.sites for latent in site.latents] for e in answers.explanations)
    without = {(site.site, latent.latent): list(latent.gate_effects) for site, latent in plain}
    pushes: list[tuple[pb.SiteExplanation, pb.Latent, Sequence[float]]] = []
    for site, latent in steered:
        if latent.steered_value == latent.value:
            continue
        effects = [-effect for effect in without.get((site.site, latent.latent), latent.gate_effects)]
        if latent.steered_value:
            share = (latent.steered_value - latent.value) / latent.steered_value
            effects = [share * effect for effect in latent.gate_effects]
        pushes.append((site, latent, effects))
    count = len(pushes)
    pushes = pushes or [(site, latent, latent.gate_effects) for site, latent in plain]
    most = sorted(pushes, key=lambda push: -sum(map(abs, push[2])))[:MOST_ROWS]
    cells = dict(blocks)
    rows = [_row(site.block, latent, effects, cells[site.block], count > 0) for site, latent, effects in most]
    return rows, count


def _row(block: int, latent: pb.Latent, pushes: Sequence[float], cells: Sequence[Cell], steered: bool) -> LatentRow:
    words = {("opened", True): " (opened)", ("shut", False): " (closed)"} if steered else {}
    order = sorted(zip(pushes, cells, strict=True), key=lambda pair: -abs(pair[0]))[:MOST_PUSHES]
    strongest = [f"{c.unit} {signed(p)}{words.get((c.state, p > 0), '')}" for p, c in order if abs(p) >= 0.005]
    return LatentRow(block, latent.latent, latent.value, latent.steered_value, tuple(pushes), tuple(strongest))


def _record(profile: pb.GetProfileResponse | None) -> str:
    if profile is None or not profile.profile.HasField("before"):
        return ""
    of, before, after = profile.profile, profile.profile.before, profile.profile.after
    return (
        f"Measured on {of.images:,} images of its classes when the bundle was made: recall {before.recall:.3f} → "
        f"{after.recall:.3f}, precision {before.precision:.3f} → {after.precision:.3f}, compute "
        f"{before.compute_fraction:.2f} → {after.compute_fraction:.2f}."
    )
