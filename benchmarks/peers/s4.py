"""S4 with diagonal state matrices, in recurrent form: a peer whose state does not grow.

Gu, Gupta, Goel and Re 2022, "On the Parameterization and Initialization of Diagonal State Space
Models", arXiv:2206.11893 (S4D-Lin, zero-order hold). The state of a channel is 64 numbers: one of
each of 32 conjugate pairs. S4 takes the place of the STU in the blocks of a Flash-STU.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import FLOAT_BYTES, MULTIPLE, Peer, fitted
from stu.config import ModelConfig
from stu.layers import GatedMLP, RMSNorm

PAIRS = 32
SHORTEST_STEP, LONGEST_STEP = 0.001, 0.1


class S4(Peer):
    """Diagonal state spaces in the blocks of a Flash-STU, decoded as a recurrence."""

    def _build(self, num_parameters: int) -> Any:
        return fitted(lambda hidden: S4Model(self.shape, MULTIPLE * hidden), num_parameters)

    def start(self, batch: int, positions: int) -> None:
        shape = self.shape
        self._discretized = self.model.discretized()
        self.states = torch.zeros(
            shape.num_layers, batch, shape.width, PAIRS, dtype=torch.complex64
        )

    def prefill(self, tokens: Tensor) -> Tensor:
        for column in tokens.unbind(1):
            logits = self.step(column)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model.step(tokens, self.states, self._discretized)
        return logits

    def cache_bytes(self, batch: int, positions: int) -> int:
        return batch * self.shape.num_layers * self.shape.width * 2 * PAIRS * FLOAT_BYTES


class S4Mixer(nn.Module):
    """`h = exp(dt A) h + x, y = 2 Re(C' h) + skip x` for each channel of `x W`, one token at a
    time; C' is C times the discretized input matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, width, bias=False)
        steps = torch.empty(width).uniform_(math.log(SHORTEST_STEP), math.log(LONGEST_STEP))
        self.log_time_steps = nn.Parameter(steps)
        self.log_decays = nn.Parameter(torch.full((width, PAIRS), math.log(0.5)))
        self.frequencies = nn.Parameter(math.pi * torch.arange(PAIRS).float().repeat(width, 1))
        self.outputs = nn.Parameter(torch.randn(width, PAIRS, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(width))

    def decays(self) -> Tensor:
        """Return A, `[D, PAIRS]`."""
        return torch.complex(-self.log_decays.exp(), self.frequencies)

    def discretized(self) -> tuple[Tensor, Tensor]:
        """Return `exp(dt A) [D, PAIRS]`, complex, and `2 C'` as real factors of a state's real and
        imaginary parts, `[D, 2 PAIRS]`."""
        decays = self.decays()
        kept = torch.exp(decays * self.log_time_steps.exp()[:, None])
        outputs = 2 * torch.view_as_complex(self.outputs) * (kept - 1) / decays
        return kept, torch.view_as_real(outputs.conj().resolve_conj()).flatten(1)


class S4MLP(GatedMLP):
    """Gated MLP of any hidden width."""

    def __init__(self, width: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)


class S4Block(nn.Module):
    """Mixer and gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, shape: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(shape.width, shape.norm_eps)
        self.mlp_norm = RMSNorm(shape.width, shape.norm_eps)
        self.mixer, self.mlp = S4Mixer(shape.width), S4MLP(shape.width, hidden)


class S4Model(nn.Module):
    """A language model of `S4Block`s, decoded token by token. hidden: Width inside the MLPs."""

    def __init__(self, shape: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        nn.init.normal_(self.embedding.weight, std=shape.width**-0.5)
        self.blocks: Any = nn.ModuleList(S4Block(shape, hidden) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        self.unembed = nn.Linear(shape.width, shape.vocab_size, bias=False)
        self.unembed.weight = self.embedding.weight

    def discretized(self) -> list[tuple[Tensor, Tensor]]:
        """Return what `step` needs of each block; weights do not change while decoding."""
        return [block.mixer.discretized() for block in self.blocks]

    def step(
        self, tokens: Tensor, states: Tensor, discretized: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return the logits `[B, vocab_size]` after `tokens [B]`; the complex states
        `[layers, B, D, PAIRS]` are updated in place."""
        x = self.embedding(tokens)
        for block, state, (kept, outputs) in zip(self.blocks, states, discretized, strict=True):
            u = block.mixer.input(block.mixer_norm(x))
            state.mul_(kept).add_(u[..., None])
            mixed = (torch.view_as_real(state).flatten(2) * outputs).sum(-1)
            x = x + mixed + block.mixer.skip * u
            x = x + block.mlp(block.mlp_norm(x))
        logits: Tensor = self.unembed(self.norm(x))
        return logits
