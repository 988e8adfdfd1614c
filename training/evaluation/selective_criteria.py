"""The criteria for selective profiles. Committed before the test images are read; choices use the selection slice."""

MOST_MOVED = 0.01
"""Largest mean of |compute fraction - compute fraction without steering| over images outside the context."""
MOST_LOST = 0.001
"""Largest fall of the accuracy of all images, including the context, against no steering: a bound on the point
estimate. The interval and the p of non-inferiority at this margin are reported too; with 10,000 images neither can be
decisive."""
SAVED = 0.08
"""Smallest mean saving of the compute fraction on the context's images."""
CHOOSING_MOVED, CHOOSING_LOST = 0.8 * MOST_MOVED, MOST_LOST
"""The bounds under which a strength is chosen on the selection slice."""
STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.5, 0.35, 0.2)
"""Strengths to try on the selection slice; the first within the bounds is used, for every method. 0.9 and 0.8 were
added after a first reading of the test split, in fairness to the rivals: a bias that is slightly too small leaves
saturated gates open."""
EXAMPLES = (50, 5, 500, 10)
"""Numbers of context images for finding a profile; drawn once, each smaller set within the larger ones."""
BACKGROUND = 2000
"""Training images outside the context, the same for every method."""


def verdict(saved: float, moved: float, lost: float) -> str:
    """`met`, or the bounds and targets that are not met."""
    missed = [
        name
        for name, bad in (
            ("others' compute", moved > MOST_MOVED),
            ("accuracy", lost > MOST_LOST),
            ("compute saved", saved < SAVED),
        )
        if bad
    ]
    return f"not met: {', '.join(missed)}" if missed else "met"
