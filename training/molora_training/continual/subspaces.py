"""The subspaces that tasks' inputs lie in: what modules read, and the directions in which they read most."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from molora_training.continual.method import lora_layers
from molora_training.data import Encoded, collate

SPARE, PASSES = 16, 8  # of the subspace iteration: vectors beside those that are asked for, and multiplications
NONE = 1e-6  # of a covariance's norm: a singular value that is rounding


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The left singular vectors of the largest singular values.

    A wide matrix is decomposed by subspace iteration from a fixed start: few directions are wanted of many, and inputs
    of a transformer have few large ones.

    Args:
        matrix: [d, n]. count: how many, at most d.

    Returns:
        Orthonormal columns [d, count] and the values [count], largest first, float64.
    """
    matrix = matrix.double()
    width = count + SPARE
    if width >= min(matrix.shape):
        u, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], values[:count]
    start = torch.randn(matrix.shape[1], width, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(matrix @ start.to(matrix.device))[0]
    for _ in range(PASSES):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q)[0])[0]
    u, values, _ = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u[:, :count], values[:count]


def outside(covariance: Tensor, basis: Tensor) -> Tensor:
    """(I - M M^T) C: what a covariance C [d, d] has outside the span of an orthonormal basis M [d, n]; float64."""
    covariance, basis = covariance.double(), basis.double().to(covariance.device)
    return covariance - basis @ (basis.T @ covariance)


def directions(covariance: Tensor, basis: Tensor, count: int) -> Tensor:
    """Where inputs are largest outside a subspace: the leading left singular vectors of (I - M M^T) C.

    Args:
        covariance: C [d, d]. basis: M [d, n], orthonormal.

    Returns:
        [count, d], float64, orthonormal rows; rows of zeros where nothing is left.
    """
    vectors, values = leading(outside(covariance, basis), min(count, len(covariance)))
    rows = vectors.T * (values > NONE * covariance.double().norm()).unsqueeze(1)
    return pad(rows, (0, 0, 0, count - len(rows)))


def grown(basis: Tensor, covariance: Tensor, share: float, most: int) -> Tensor:
    """A basis with the fewest new directions by which it holds a share of the inputs' energy.

    Energy is the sum of squared singular values of the covariance, as in the code of InfLoRA's authors.

    Args:
        basis: M [d, n], orthonormal. covariance: C [d, d].
        share: ||M M^T C||^2 / ||C||^2 that is wanted, Frobenius norms.
        most: directions; what M has stays first.

    Returns:
        [d, n to most], float32.
    """
    total, room = covariance.double().square().sum(), min(most, len(covariance)) - basis.shape[1]
    if room < 1 or total == 0:
        return basis
    rest = outside(covariance, basis)
    vectors, values = leading(rest, room)
    energy = values.square() / total
    before = 1 - rest.square().sum() / total + energy.cumsum(0) - energy  # that is held without the direction
    return torch.cat([basis, vectors[:, before < share].to(basis)], 1)


class Reads:
    """What the modules with an adapter read: their inputs' second moments.

    covariances: by module the mean over tokens of x x^T, [in, in], float32 on the model's device. Of modules that read
    one tensor, as the projections of an attention do, only the first has one.
    first: of each module the one whose covariance it shares.
    """

    @torch.no_grad()
    def __init__(self, model: Any, rows: Sequence[Encoded]) -> None:
        self.covariances: dict[str, Tensor] = {}
        self.first: dict[str, str] = {}
        self._seen, self._name = torch.empty(0), ""
        layers = lora_layers(model)
        hooks = [layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in layers.items()]
        model.eval()
        for row in rows:
            batch = collate([row], 0).to(model.device)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for hook in hooks:
            hook.remove()
        self._seen = torch.empty(0)
        for total in self.covariances.values():
            total /= sum(len(row.input_ids) for row in rows)

    def _see(self, name: str, module: Any, read: tuple[Tensor, ...]) -> None:
        if read[0] is not self._seen:
            self._seen, self._name = read[0], name
            tokens = read[0].flatten(0, -2).float()
            moment = tokens.T @ tokens
            self.covariances[name] = self.covariances[name].add_(moment) if name in self.covariances else moment
        self.first[name] = self._name
