"""Next-token cross-entropy that never holds the logits of all positions.

With a vocabulary of 200,064 the logits of 8,192 tokens are 6.5 GB in float32, and a plain loss
holds them three times. Here logits are made for a few rows at a time, and their gradients at once:
what is kept for the backward pass has the size of the hidden states and of the output matrix.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGIT_BYTES = 2**28
"""Of the logits that are there at a time, in float32."""


def next_token_loss(
    hidden: Tensor, output: Tensor, targets: Tensor, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The mean loss to be minimised, and the mean cross-entropy in it, in nats per target.

    hidden: `[N, D]`; output: `[V, D]`, logits are `hidden @ output.T`; targets: int64 `[N]`.
    z_weight: of the mean of the squared log-normalisers, which keeps logits from drifting (PaLM,
    Chowdhery et al. 2022). Products are in autocast's dtype where it is on; softmax, sums over
    targets and the output matrix's gradient are in float32 or wider.
    """
    loss, nats = _NextTokenLoss.apply(hidden, output, targets, z_weight)  # type: ignore[no-untyped-call]
    return loss, nats


@torch.no_grad()
def token_losses(hidden: Tensor, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each target, and whether it has the highest logit: both `[N]`, without gradients."""
    nats, hits = [], []
    for rows, logits in _logits(hidden, output):
        own = targets[rows]
        hits.append(logits.argmax(1) == own)
        nats.append(_exponentials(logits, own)[1])
    return torch.cat(nats), torch.cat(hits)


class _NextTokenLoss(torch.autograd.Function):
    """Gradients for a loss of weight 1, which the backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, output: Tensor, targets: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        count = len(targets)
        losses = torch.empty(count, dtype=wide, device=hidden.device)
        nats = torch.empty_like(losses)
        hidden_grad = torch.empty_like(hidden)
        output_grad = torch.zeros_like(output, dtype=wide)
        narrow_output = output.to(_product_dtype(hidden))
        for rows, logits in _logits(hidden, output):
            own = targets[rows]
            normalisers, nats[rows] = _exponentials(logits, own)
            losses[rows] = nats[rows] + z_weight * normalisers.square()
            # From exponentials to the gradient of each logit, over the mean's count.
            logits *= ((1 + 2 * z_weight * normalisers) / (logits.sum(1) * count))[:, None]
            logits[torch.arange(len(own), device=own.device), own] -= 1 / count
            narrow = logits.to(narrow_output.dtype)
            hidden_grad[rows] = narrow @ narrow_output
            own_hidden = hidden[rows].to(narrow.dtype)
            if narrow.dtype == wide:
                output_grad.addmm_(narrow.t(), own_hidden)
            else:
                output_grad += narrow.t() @ own_hidden
        ctx.save_for_backward(hidden_grad, output_grad.to(output.dtype))
        loss, mean_nats = losses.mean(), nats.mean()
        ctx.mark_non_differentiable(mean_nats)
        return loss, mean_nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad, output_grad = ctx.saved_tensors
        return hidden_grad * grad, output_grad * grad, None, None


def _logits(hidden: Tensor, output: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Of a few rows at a time, `[C, V]` in float32 or wider; the next ones take their place."""
    wide, narrow = torch.promote_types(hidden.dtype, torch.float32), _product_dtype(hidden)
    matrix = output.to(narrow).t()
    num_rows = max(1, LOGIT_BYTES // (4 * len(output)))
    # Fresh memory for each would cost more, in page faults, than what is done with it.
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
    """Log-normalisers and the targets' losses, `[C]` each; leaves exponentials, of the logits less
    each row's largest, in their place."""
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
