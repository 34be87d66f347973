"""Recall of tokens: tasks that models learn from examples of their own, and how often they succeed.

`recall`: pairs of a key and a value, then keys of them in any order, each of which asks for its
value (Arora et al. 2023, arXiv:2312.04927). Each pair has another key and another value, so that a
model that knows the values and does not tell keys apart is right in a quarter of cases. `needle`:
a single pair, hidden in noise that has values too.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.training.quality_run import register_peer
from stu.config import ModelConfig
from stu.model import FlashSTU
from train.optimizer import OptimizerConfig, make_optimizer

Task = Literal["recall", "needle"]
NUM_KEYS = 16
"""Keys are the first tokens of the vocabulary, then as many values, then noise."""
VOCAB_SIZE = 4 * NUM_KEYS
LENGTHS: dict[Task, int] = {"recall": 32, "needle": 64}
NUM_PAIRS: dict[Task, int] = {"recall": 4, "needle": 1}
NUM_QUESTIONS = 24
BATCH, TEST_BATCH = 64, 256
WIDTH, NUM_LAYERS = 64, 4
"""Two layers of a hybrid are attention; a single one cannot find what follows a key."""
IGNORED = -100
CLIP_NORM = 1.0


def examples(task: Task, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return tokens and targets `[count, length]`; targets that do not count are IGNORED."""

    def shuffled(num: int) -> Tensor:
        """Return for each text the numbers below `num`, in a random order."""
        return torch.rand(count, num, generator=random).argsort(1)

    length, num_pairs = LENGTHS[task], NUM_PAIRS[task]
    questions = length - NUM_QUESTIONS
    tokens = torch.randint(NUM_KEYS, VOCAB_SIZE, (count, length), generator=random)
    targets = torch.full_like(tokens, IGNORED)
    keys = shuffled(NUM_KEYS)[:, :num_pairs]
    values = NUM_KEYS + shuffled(NUM_KEYS)[:, :num_pairs]
    places = 2 * shuffled(questions // 2)[:, :num_pairs]
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    asked = torch.randint(0, num_pairs, (count, NUM_QUESTIONS), generator=random)
    tokens[:, questions:] = keys.gather(1, asked)
    targets[:, questions:] = values.gather(1, asked)
    return tokens, targets


@dataclass(frozen=True)
class Trial:
    """Settings of a model that learns a task."""

    task: Task
    layout: str
    """Mixers of the model; `rope` is the peer."""
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """A name for files."""
        return "-".join(str(value) for value in dataclasses.astuple(self))


def learn(trial: Trial) -> dict[str, Any]:
    """Train a small model on a task, and return its share of right answers."""
    register_peer()
    torch.manual_seed(trial.seed)
    max_seq_len = LENGTHS[trial.task]
    config = ModelConfig(
        VOCAB_SIZE, width=WIDTH, num_layers=NUM_LAYERS, layout=trial.layout,
        max_seq_len=max_seq_len, num_heads=2, mlp_ratio=2, window_tokens=max_seq_len,
    )  # fmt: skip
    model = FlashSTU(config)
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=trial.learning_rate))
    schedule = OneCycleLR(optimizer, trial.learning_rate, total_steps=trial.steps)
    random = torch.Generator().manual_seed(trial.seed)
    for _ in range(trial.steps):
        tokens, targets = examples(trial.task, BATCH, random)
        loss = cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
    tokens, targets = examples(trial.task, TEST_BATCH, torch.Generator().manual_seed(2**32))
    with torch.inference_mode():
        right = (model(tokens).argmax(-1) == targets)[targets != IGNORED]
    share = right.double().mean().item()
    return dataclasses.asdict(trial) | {"parameters": model.num_parameters(), "right": share}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(learn(Trial(**json.loads(sys.argv[1])))))
