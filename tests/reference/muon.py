"""Muon on whole matrices, one at a time, in float64, with singular values in place of products."""

import torch
from torch import Tensor


def orthogonalized(matrix: Tensor) -> Tensor:
    """Apply the iteration to the singular values of a matrix divided by its norm: each step is an
    odd polynomial, which leaves singular vectors as they are."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


class Reference:
    """A matrix under Muon with decoupled weight decay."""

    def __init__(self, matrix: Tensor, rate: float, momentum: float, decay: float) -> None:
        self.matrix, self.average = matrix.double(), torch.zeros_like(matrix, dtype=torch.float64)
        self.rate, self.momentum, self.decay = rate, momentum, decay

    def step(self, gradient: Tensor) -> None:
        """Take one step."""
        gradient = gradient.double()
        self.average = self.momentum * self.average + (1 - self.momentum) * gradient
        ahead = self.momentum * self.average + (1 - self.momentum) * gradient
        update = 0.2 * max(self.matrix.shape) ** 0.5 * orthogonalized(ahead)
        self.matrix = self.matrix - self.rate * (update + self.decay * self.matrix)
