"""Which units ran, in one array."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from service.pb import steering_pb2 as pb


def unit_mask(predictions: Iterable[pb.Prediction]) -> NDArray[np.bool_]:
    """(B, gated blocks, units): heads, then MLP groups."""
    blocks = [zip(p.head_mask, p.mlp_mask, strict=True) for p in predictions]
    return np.array([[[*heads.kept, *groups.kept] for heads, groups in of] for of in blocks], bool)
