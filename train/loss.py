"""Next-token cross-entropy that never holds the logits of all positions.

With a vocabulary of 200,064 the logits of 8,192 tokens are 6.5 GB in float32, and a plain loss
holds three tensors of that size. Here logits are computed for a few rows at a time,
together with their gradients: the backward pass needs only tensors of the size of hidden states and
output matrix.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGIT_BYTES = 2**28
"""Size of the logits that exist at a time, in float32."""


def next_token_loss(
    hidden: Tensor,
    output: Tensor,
    targets: Tensor,
    z_weight: float = 0.0,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss to minimise, and the mean cross-entropy in it, in nats per target.

    A target that does not count has a loss of 0 in both means. So each that counts weighs the same
    in the gradients, however targets are divided among batches and ranks.

    Products are in autocast's dtype where it is on; softmax, sums over targets and the gradient of
    the output matrix are in float32 or wider.

    Args:
        hidden: Hidden states `[N, D]`.
        output: Output matrix `[V, D]`; logits are `hidden @ output.T`.
        targets: Tokens to predict, int64 `[N]`.
        z_weight: Weight of the mean squared log-normaliser, which keeps logits from drifting (PaLM,
            Chowdhery et al. 2022).
        counted: Whether each target counts, `[N]`; None if all do.
    """
    loss, nats = _NextTokenLoss.apply(hidden, output, targets, z_weight, counted)  # type: ignore[no-untyped-call]
    return loss, nats


@torch.no_grad()
def token_losses(hidden: Tensor, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each target in nats, and whether its logit is the highest: both `[N]`."""
    nats, hits = [], []
    for rows, logits in _logits(hidden, output):
        own = targets[rows]
        hits.append(logits.argmax(1) == own)
        nats.append(_exponentials(logits, own)[1])
    return torch.cat(nats), torch.cat(hits)


class _NextTokenLoss(torch.autograd.Function):
    """Loss whose forward pass computes the gradients, which the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        output: Tensor,
        targets: Tensor,
        z_weight: float,
        counted: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        count = len(targets)
        losses = torch.empty(count, dtype=wide, device=hidden.device)
        nats = torch.empty_like(losses)
        hidden_grad = torch.empty_like(hidden)
        is_trained = ctx.needs_input_grad[1]  # else an adapted model's is frozen
        output_grad = torch.zeros_like(output, dtype=wide) if is_trained else None
        narrow_output = output.to(_product_dtype(hidden))
        for rows, logits in _logits(hidden, output):
            own = targets[rows]
            normalisers, nats[rows] = _exponentials(logits, own)
            losses[rows] = nats[rows] + z_weight * normalisers.square()
            # In place: from exponentials to the gradients of the mean loss by the logits.
            logits *= ((1 + 2 * z_weight * normalisers) / (logits.sum(1) * count))[:, None]
            logits[torch.arange(len(own), device=own.device), own] -= 1 / count
            if counted is not None:
                logits.masked_fill_(~counted[rows, None], 0)
            narrow = logits.to(narrow_output.dtype)
            hidden_grad[rows] = narrow @ narrow_output
            if output_grad is None:
                continue
            own_hidden = hidden[rows].to(narrow.dtype)
            if narrow.dtype == wide:
                output_grad.addmm_(narrow.t(), own_hidden)
            else:
                output_grad += narrow.t() @ own_hidden
        saved = None if output_grad is None else output_grad.to(output.dtype)
        ctx.save_for_backward(hidden_grad, saved)
        if counted is not None:
            losses.masked_fill_(~counted, 0)
            nats.masked_fill_(~counted, 0)
        loss, mean_nats = losses.mean(), nats.mean()
        ctx.mark_non_differentiable(mean_nats)
        return loss, mean_nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, output_grad = ctx.saved_tensors
        by_output = None if output_grad is None else output_grad * grad
        return hidden_grad * grad, by_output, None, None, None


def _logits(hidden: Tensor, output: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of a few rows at a time in one memory, `[C, V]`, float32 or wider."""
    wide, narrow = torch.promote_types(hidden.dtype, torch.float32), _product_dtype(hidden)
    matrix = output.to(narrow).t()
    num_rows = max(1, LOGIT_BYTES // (4 * len(output)))
    # Page faults of fresh memory would cost more than the computation.
    room = torch.empty(min(num_rows, len(hidden)), len(output), dtype=wide, device=hidden.device)
    for start in range(0, len(hidden), num_rows):
        rows = slice(start, start + num_rows)
        own = hidden[rows].to(narrow)
        logits = room[: len(own)]
        if narrow == wide:
            torch.mm(own, matrix, out=logits)
        else:
            logits.copy_(own @ matrix)
        yield rows, logits


def _exponentials(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-normalisers and the targets' losses, `[C]` each.

    `logits` are replaced by exponentials of their differences to the row's largest.
    """
    largest = logits.amax(1, keepdim=True)
    logits -= largest
    own = logits.gather(1, targets[:, None]).squeeze(1)
    log_sums = logits.exp_().sum(1).log_()
    return log_sums + largest.squeeze(1), log_sums - own


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
