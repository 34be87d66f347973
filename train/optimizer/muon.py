"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalized.

A matrix follows its running average of gradients, whose singular values are first brought near 1 by
five steps of a Newton-Schulz iteration. The result is scaled by `0.2 sqrt(max(rows, columns))`, so
that its elements are as large as those of AdamW's updates, and AdamW's learning rates and weight
decay suit it (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982, section 2.2).
All other weights are updated by AdamW: the embedding, norms, filters and short convolutions.

It keeps one state tensor for matrices and two for the others. `torch.optim.Muon` computes the same
(with `adjust_lr_fn="match_rms_adamw"`), but takes only whole matrices, and always in bfloat16.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.optimizer.adamw import DeviceAdamW
from train.optimizer.adamw import hyperparameters as adamw_hyperparameters
from train.optimizer.base import OptimizerConfig, OptimizerKind, running_average
from train.optimizer.matrices import MatrixExchange, Part, Piece, flat

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Factors of x, x^3 and x^5 in each step of the iteration, those of Jordan et al."""
STEPS = 5
LEAST_NORM = 1e-7
"""Norm below which a matrix is not scaled up to norm 1."""
UPDATE_SIZE = 0.2
"""Root mean square of an update's elements, about that of AdamW's."""


class Muon(DeviceAdamW):
    """Muon for the groups of parameters that have `matrices`, and AdamW for the others.

    Args:
        groups: Parameter groups. In those of matrices, `matrices` has for each parameter the number
            of matrices that are stacked in it along its first dim.
        momentum: Decay of the running average of a matrix's gradients.
        hyperparameters: Those of `torch.optim.AdamW`.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], momentum: float, **hyperparameters: Any
    ) -> None:
        self.counts: list[dict[Tensor, int]] = [
            dict(zip(group["params"], group["matrices"], strict=True))
            if "matrices" in group
            else {}
            for group in groups
        ]
        """Number of matrices in each parameter, by group; empty for groups of AdamW."""
        self._parts: dict[Tensor, list[Part]] = {}
        self._device: torch.device | None = None
        self._exchanges: dict[tuple[Tensor, ...], MatrixExchange] = {}
        own = [
            {**group, "matrices": bool(counts), "momentum": momentum}
            for group, counts in zip(groups, self.counts, strict=True)
        ]
        super().__init__(own, **hyperparameters)

    def divide(self, parts: Mapping[Tensor, list[Part]], device: torch.device) -> None:
        """Tell which parts of matrices are in the tensors that replace the parameters here.

        Args:
            parts: Parts of all matrices of a group, by the tensor; in equal order on all ranks.
            device: Device on which matrices are orthogonalized.
        """
        self._parts, self._device = dict(parts), device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, and return the loss of `closure`; collective
        among the ranks that hold the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._update(**group)
        return loss

    def _update(
        self, *, params: list[Tensor], lr: float, momentum: float, weight_decay: float, **_: Any
    ) -> None:
        held = tuple(parameter for parameter in params if parameter.grad is not None)
        if not held:
            return
        for parameter in held:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.contiguous()
            average = flat(running_average(self.state[parameter], parameter))
            average.lerp_(flat(parameter.grad), 1 - momentum)
            flat(parameter).mul_(1 - lr * weight_decay)

        def direction(piece: Piece) -> Tensor:
            assert piece.held.grad is not None
            average = flat(self.state[piece.held]["exp_avg"])[piece.elements]
            return flat(piece.held.grad)[piece.elements].lerp(average, momentum)  # Nesterov's

        device = self._device or held[0].device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        exchange = self._exchange(held, device)
        for piece, update in exchange.transformed(direction, orthogonalized, dtype):
            size = lr * UPDATE_SIZE * max(piece.matrix.rows, piece.matrix.columns) ** 0.5
            values = flat(piece.held)[piece.elements]
            values.add_(update.to(values.device, values.dtype), alpha=-size)

    def _exchange(self, held: tuple[Tensor, ...], device: torch.device) -> MatrixExchange:
        if held not in self._exchanges:
            counts = {p: count for group in self.counts for p, count in group.items()}
            parts = [
                part
                for parameter in held
                for part in self._parts.get(parameter)
                or [Part(parameter, 0, len(flat(parameter)), parameter.shape, counts[parameter])]
            ]
            first = held[0]
            group = first.device_mesh.get_group() if isinstance(first, DTensor) else None
            self._exchanges[held] = MatrixExchange(parts, device, group)
        return self._exchanges[held]


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices `[B, rows, columns]` into about 0.7 to 1.2, and keep
    their singular vectors. Those below 1/1000 of the norm stay smaller."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (x / norms.clamp(min=LEAST_NORM)).to(matrices.dtype)
    first, third, fifth = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT  # of the shorter side
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first
        )
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    """Return the values of a parameter group by the names of `Muon`."""
    return {**adamw_hyperparameters(config), "momentum": config.momentum}


MUON = OptimizerKind(
    make=Muon,
    state_tensors=("exp_avg", "exp_avg_sq"),
    matrix_state_tensors=("exp_avg",),
    hyperparameters=hyperparameters,
)
