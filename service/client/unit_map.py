"""A map of the units that ran, for a terminal: gated blocks down, heads and MLP groups across, shaded by the share of
the images that ran them."""

import os
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.pb import steering_pb2 as pb

SHADES, ASCII_SHADES = " ░▒▓█", " .:*#"
CYAN, MAGENTA, GREEN, RED = 36, 35, 32, 31
KINDS = (("h", "head_mask", CYAN), ("m", "mlp_mask", MAGENTA))
"""Letter, field of a prediction, colour."""


def shades() -> str:
    """Shades from no image to all images, in characters that standard output can encode."""
    return SHADES if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII_SHADES


def has_colour() -> bool:
    """Whether standard output is a terminal whose user has not turned colour off (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def unit_map(columns: Sequence[tuple[str, Sequence[pb.Prediction]]], colour: bool) -> str:
    """One map for each title and its predictions, side by side.

    colour: heads are cyan and MLP groups magenta; but in maps after the first, what runs for more images than in the
    first is green, for fewer red.
    """
    some = columns[0][1][0]
    kinds = [(letter, mask, paint) for letter, mask, paint in KINDS if getattr(some, mask)]
    shares = {mask: [_shares(predictions, mask) for _, predictions in columns] for _, mask, _ in kinds}
    names = {mask: [f"{letter}{unit}" for unit in range(shares[mask][0].shape[1])] for letter, mask, _ in kinds}

    def cells(mask: str, column: int, row: int, paint: int) -> str:
        before, now = shares[mask][0][row], shares[mask][column][row]
        shown = []
        for name, old, new in zip(names[mask], before, now, strict=True):
            mark = shades()[round(float(new) * (len(SHADES) - 1))] * len(name)
            code = GREEN if new > old else RED if new < old else paint
            shown.append(f"\033[{code}m{mark}\033[0m" if colour and mark.strip() else mark)
        return " ".join(shown)

    header = " ".join(" ".join(names[mask]) for _, mask, _ in kinds)
    width = max(len(header), *(len(title) for title, _ in columns))
    pad = " " * (width - len(header))
    lines = [" " * 12 + "     ".join(title.ljust(width) for title, _ in columns)]
    lines.append(" " * 12 + "     ".join(header + pad for _ in columns))
    for row, block in enumerate(block.block for block in some.head_mask):
        maps = (
            "│" + "│".join(cells(mask, column, row, paint) for _, mask, paint in kinds) + "│" + pad
            for column in range(len(columns))
        )
        lines.append(f"  block {block:>2} " + "   ".join(maps))
    return "\n".join(line.rstrip() for line in lines)


def legend(count: int, what: str = "images") -> str:
    """The meaning of the shades in a map of `count` images. what: the name of the images."""
    full = shades()[-1] * 2
    if count == 1:
        return f"Units that ran ({full})"
    return f"Units that ran for the {count} {what} (blank: never, {full}: for all of them)"


def _shares(predictions: Sequence[pb.Prediction], mask: str) -> NDArray[np.float64]:
    """Share of the images for which each unit ran: (gated blocks, units)."""
    masks = [[list(block.kept) for block in getattr(prediction, mask)] for prediction in predictions]
    share: NDArray[np.float64] = np.asarray(masks, np.float64).mean(0)
    return share
