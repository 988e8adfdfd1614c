"""k-sparse probing: how well a few latents predict the factors that an image was made from (typefaces).

A factor is regressed on k features of the residual, which are chosen and weighted on the images of half of the designs
and measured on those of the other half (k-sparse probing, Gurnee et al. 2023, arXiv:2305.01610; the k are found by
orthogonal matching pursuit). The features are an autoencoder's latents or, instead, principal components, the latents
of a random dictionary, and those of an autoencoder whose decoder is random (arXiv:2602.14111).

Letters: B images, S sites, L features, D residual width, F factors, K numbers of features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from training.data.degradation import NO_NEIGHBOUR
from training.data.splits import Split
from training.data.typefaces import FACTORS
from training.evaluation.dictionaries import STABLE_AT, SWEEP, RandomStart, fitted
from training.evaluation.selective_rivals import FrozenDecoder
from training.model.sae import Sae
from training.sae.fit import Fitting

KS = (1, 2, 4, 8, 16)
Encode = Callable[[int, Tensor], Tensor]
"""(site, residual (B, D)) -> features (B, L)."""


def dictionaries(train: Tensor, held_out: Tensor, sae: Sae, seed: int, bf16: bool) -> dict[str, Encode]:
    """The dictionaries by name. bundle: `sae`. The others are small fits to residuals (S, B, D), which differ only in
    their random rows; random: not fitted. Thresholds come from held-out residuals."""
    kinds = {"sae": Fitting, "frozen decoder": FrozenDecoder}
    found = {name: fitted(kind, train, STABLE_AT, seed, bf16).folded(held_out) for name, kind in kinds.items()}
    torch.manual_seed(seed)
    found["random"] = RandomStart(train, SWEEP.model_copy(update={"k": STABLE_AT})).folded(held_out)
    means = train.mean(1)
    components = [
        torch.linalg.eigh((x - m).T @ (x - m)).eigenvectors.flip(1) for x, m in zip(train, means, strict=True)
    ]
    return {
        "bundle": sae.encode,
        **{name: of.encode for name, of in found.items()},
        "pca": lambda site, residual: (residual - means[site]) @ components[site],
    }


def can_probe(split: Split) -> bool:
    """Whether the factors of its images are known, and the images come from two designs or more."""
    return split.factors is not None and len(split.factors[:, FACTORS.index("design")].unique()) > 1


def known_factors(split: Split) -> tuple[dict[str, Tensor], Tensor]:
    """The factors (B,) by name (for a neighbour: whether there is one), and the design of each image (B,)."""
    assert split.factors is not None
    factors = dict(zip(FACTORS, split.factors.T, strict=True))
    design, _ = factors.pop("design"), factors.pop("face")
    for side in ("left", "right"):
        factors[f"{side} neighbour"] = (factors.pop(f"{side} gap") != NO_NEIGHBOUR).float()
    return factors, design


@torch.no_grad()
def probed(encodings: Mapping[str, Encode], residuals: Tensor, split: Split) -> dict[str, Any]:
    """Out-of-sample R2 of each factor with each dictionary, mean over the sites: r2[dictionary][k, F]. `residual`: with
    a ridge regression on all dimensions. residuals (S, B, D): of the split's images, which have two designs or more.
    """
    factors, design = known_factors(split)
    fit = design.unique(return_inverse=True)[1] % 2 == 0
    values = torch.stack(list(factors.values()), 1).double()  # (B, F)
    r2 = {
        name: torch.stack([
            sparse_r2(encode(site, x).double(), values, fit) for site, x in enumerate(residuals)
        ]).mean(0)
        for name, encode in encodings.items()
    }  # fmt: skip
    whole = torch.stack([ridge_r2(x.double(), values, fit) for x in residuals]).mean(0)
    designs = [int(design[half].unique().numel()) for half in (fit, ~fit)]
    return {
        "factors": list(factors),
        "k": list(KS),
        "designs": designs,
        "images": [int(fit.sum()), int((~fit).sum())],
        "r2": {name: [[round(v, 4) for v in row] for row in of.tolist()] for name, of in r2.items()},
        "residual": [round(v, 4) for v in whole.tolist()],
    }


def sparse_r2(features: Tensor, values: Tensor, fit: Tensor) -> Tensor:
    """(K, F): R2 of values (B, F) on the images outside `fit` (B,), with k of the features (B, L) for each k in KS.

    For each factor, the next feature is the one that correlates most with the remainder of the previous ones."""
    x, y = _standardised(features, fit), _standardised(values, fit)
    scores = [[_r2(y[:, f], predicted, fit) for predicted in _pursuit(x, y[:, f], fit)] for f in range(y.shape[1])]
    return torch.tensor(scores).T


def ridge_r2(features: Tensor, values: Tensor, fit: Tensor) -> Tensor:
    """(F,): the same with all features."""
    x, y = _standardised(features, fit), _standardised(values, fit)
    of_fit = x[fit]
    weight = torch.linalg.solve(of_fit.T @ of_fit + torch.eye(x.shape[1]).to(x), of_fit.T @ y[fit])
    return torch.tensor([_r2(y[:, f], (x @ weight)[:, f], fit) for f in range(y.shape[1])])


def _pursuit(x: Tensor, y: Tensor, fit: Tensor) -> list[Tensor]:
    """Predictions (B,) of y (B,) for each k in KS. Features (B, L) and y are standardised."""
    predicted, chosen, predictions = torch.zeros_like(y), list[int](), []
    for count in range(1, KS[-1] + 1):
        left = (x[fit].T @ (y - predicted)[fit]).abs()
        left[chosen] = -1
        chosen.append(int(left.argmax()))
        few = x[:, chosen]
        predicted = few @ torch.linalg.lstsq(few[fit], y[fit, None], driver="gelsd").solution[:, 0]
        if count in KS:
            predictions.append(predicted)
    return predictions


def _standardised(values: Tensor, fit: Tensor) -> Tensor:
    """Values standardised by mean and deviation over the images in `fit`; constant ones become 0."""
    deviation = values[fit].std(0, correction=0)
    centred = values - values[fit].mean(0)
    return torch.where(deviation > 1e-9, centred / deviation.clamp_min(1e-9), 0.0)


def _r2(y: Tensor, predicted: Tensor, fit: Tensor) -> float:
    """R2 on the images outside `fit`, about the mean over `fit`, which is 0; 0 for a constant."""
    error, whole = (values[~fit].square().sum() for values in (y - predicted, y))
    return float(1 - error / whole) if whole else 0.0
