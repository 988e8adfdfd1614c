"""The picture of the dial: measured curves, the budget on them, and what the image costs."""

from dataclasses import dataclass

import numpy as np

from service.client.tables import spread
from service.playground.asking import Answers

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 210, 44, 10, 12, 40
"""Size and margins of the dial's picture, in its own units."""


@dataclass(frozen=True)
class Curve:
    """A measured curve of the dial, placed in its picture."""

    name: str
    line: str
    """All points, of an SVG polyline."""
    places: tuple[tuple[float, float], ...]
    """Where `points` lie."""
    points: tuple[tuple[float, float], ...]
    """(compute fraction, accuracy), spread over the curve."""


@dataclass(frozen=True)
class DialView:
    """The dial's picture: curves, where the budget lies on them, and what this image costs."""

    curves: tuple[Curve, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    spent: float | None
    """Position of this image's compute fraction; None: outside the picture."""
    budget: tuple[float, float] | None
    caption: str


def dial_of(answers: Answers) -> DialView | None:
    """The picture of the dial; None if the model has none."""
    question, model, profile = answers.question, answers.model, answers.profile
    if not model.dial:
        return None
    measured = {"without steering": model.dial}
    if profile and profile.dial and question.steers:
        measured[f"profile {question.profile}"] = profile.dial
    points = {name: [(p.compute_fraction, p.accuracy) for p in curve] for name, curve in measured.items()}
    every = [point for curve in points.values() for point in curve]
    (x0, y0), (x1, y1) = (tuple(f(axis) for axis in zip(*every, strict=True)) for f in (min, max))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y1 - y) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    curves = []
    for name, curve in points.items():
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve))
        some = tuple(curve[index] for index in spread([compute for compute, _ in curve]))
        curves.append(Curve(name, line, tuple(place(*point) for point in some), some))
    spent = answers.predictions[1].compute_fraction
    (_, asked), budget, caption = answers.budgets, None, "No budget is set."
    if asked is not None:
        name, own = list(points.items())[-1]
        accuracy = float(np.interp(asked, *np.transpose(own)))
        budget = place(min(max(asked, x0), x1), accuracy)
        caption = f"Budget {asked:.2f}, {name}: accuracy {accuracy:.3f} as measured."
    return DialView(
        curves=tuple(curves),
        x_ticks=tuple((place(x, y0)[0], f"{x:.2f}") for x in (x0, (x0 + x1) / 2, x1)),
        y_ticks=tuple((place(x0, y)[1], f"{y:.3f}") for y in (y0, (y0 + y1) / 2, y1)),
        spent=place(spent, y0)[0] if x0 <= spent <= x1 else None,
        budget=budget,
        caption=f"{caption} This image costs {spent:.2f}.",
    )
