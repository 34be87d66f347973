"""Add a mixer in one file: the gated short convolution of LFM2.

The class below is all that the rest of the project needs. It is registered under a name, trained on
a little text, and decoded by the engine, whose tokens equal those of the full forward pass.

    python examples/add_a_mixer.py

A mixer inside the project would be the same class in `stu/`, with its import path in
`stu.layouts.MIXERS`.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from serve import Engine, EngineConfig, Request, SamplingParams
from stu.config import ModelConfig
from stu.layouts import LAYOUTS, register_mixer
from stu.mixers import LastInputs, Mixer
from stu.model import FlashSTU
from stu.sequences.base import Sequences
from stu.tokenizers.sentence_piece import train_bpe

NUM_TAPS = 3


class GatedShortConvolution(Mixer):
    """`output(C * (taps conv (B * x)))`, where B, C and x are projections of the input.

    Liquid AI 2025, "LFM2 Technical Report", arXiv:2511.23404.
    """

    def __init__(self, config: ModelConfig) -> None:
        # While decoding, the layer remembers the last two inputs of its convolution.
        super().__init__(LastInputs(config.width, NUM_TAPS))
        self.input = nn.Linear(config.width, 3 * config.width, bias=False)
        self.taps = nn.Parameter(torch.empty(NUM_TAPS, config.width))
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        inner_gate, outer_gate, values = self.input(x).chunk(3, dim=-1)  # [B, T, 3 D]
        mixed = sequences.convolve_short(self, inner_gate * values, self.taps)
        output: Tensor = self.output(outer_gate * mixed)
        return output

    def initialize(self, depth_scale: float) -> None:
        nn.init.xavier_normal_(self.input.weight)
        nn.init.uniform_(self.taps, -(NUM_TAPS**-0.5), NUM_TAPS**-0.5)
        nn.init.xavier_normal_(self.output.weight, gain=depth_scale)


def main() -> None:
    """Train a small model with the new mixer, and decode it in both ways."""
    register_mixer("short_convolution", GatedShortConvolution)
    LAYOUTS["lfm2"] = ("short_convolution", "short_convolution", "attention")

    torch.manual_seed(0)
    text = Path(__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_bpe([text], 400, Path(folder) / "tokenizer.model")
    config = ModelConfig(
        tokenizer.vocab_size, width=64, num_layers=3, layout="lfm2", max_seq_len=256
    )
    model = FlashSTU(config)

    ids = torch.tensor(tokenizer.encode(text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        starts = torch.randint(len(ids) - 65, (8, 1))
        batch = ids[starts + torch.arange(65)]  # [B, T + 1]
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < 0.8 * losses[0]

    model.eval()
    engine = Engine(model, tokenizer, EngineConfig(cache_gib=0.1))
    prompt = tokenizer.encode("class Gated")
    engine.add(Request(prompt, SamplingParams(max_new_tokens=40, stop_at_eos=False)))
    new: list[int] = []
    while engine.has_work:
        for output in engine.step():
            new += output.new_token_ids
    print(tokenizer.decode(prompt + new))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + new]))[0]
    assert new == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


if __name__ == "__main__":
    main()
