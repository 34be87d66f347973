"""`python -m benchmarks speculation`: decoding with guessed tokens against decoding without them.

Two engines of one model, with the usual `max_running`, decode the same answers in turns, a few
tokens at a time, with `speculate` and without. The model's weights are random, so each token that
it chooses is replaced by the next of a given answer, as a model that knows it would choose: all
else is as always, and so is its time.
Times are of the processor, so that other processes count less.
"""

import importlib
import inspect
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from benchmarks.machine import describe
from serve.config import EngineConfig, EngineWeights
from serve.engine.engine import Engine
from serve.engine.job import Job
from serve.request import Request
from serve.sampling.chooser import Choice
from serve.sampling_params import SamplingParams
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer
from stu.tokenizers.sentence_piece import train_bpe

MODULES = (
    "argparse",
    "calendar",
    "configparser",
    "difflib",
    "pathlib",
    "shutil",
    "smtplib",
    "zipfile",
)
"""Modules of the standard library whose source the tokenizer learns, and the answers are made of.
"""
TURN = 4
"""Tokens of a request that an engine decodes in its turn, at least."""
CODE_CHARS = 3000
"""Characters of a module, from its middle on, that are a prompt."""
PROMPT_TOKENS = 256
"""Tokens of prompts that are not code."""
Pair = tuple[list[int], list[int]]
"""A prompt and its answer."""


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    batches: tuple[PositiveInt, ...] = (1, 4)
    """Numbers of requests that decode together, with different answers of one kind."""
    new_tokens: PositiveInt = 256
    """Tokens of an answer."""
    width: PositiveInt = 1024
    """Width of the model."""
    layers: PositiveInt = 8
    """Blocks of the model."""
    layout: str = "stu"
    """Mixers of the model."""
    weights: EngineWeights = "float"
    """Format of the weights."""
    vocab_size: PositiveInt = 4096
    """Tokens of the vocabulary."""


def measure(options: Options) -> dict[str, Any]:
    """Return the tokens per second of each kind of answers, and the ratio of both engines."""
    sources = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        tokenizer = train_bpe(sources, options.vocab_size, path)
    config = ModelConfig(
        options.vocab_size,
        width=options.width,
        num_layers=options.layers,
        layout=options.layout,
        max_seq_len=2048,
    )
    torch.manual_seed(0)
    model, runs = FlashSTU(config).eval(), []
    for batch in options.batches:
        for name, pairs in answers(tokenizer, sources, options.new_tokens, batch).items():
            run = {"text": name, "batch": batch, "threads": torch.get_num_threads()}
            runs.append(run | compare(model, tokenizer, pairs, options.weights))
    return {"machine": describe(), "model": config.layout, "runs": runs}


def answers(
    tokenizer: Tokenizer, sources: Sequence[str], length: int, count: int
) -> dict[str, list[Pair]]:
    """Return `count` prompts and answers of `length` tokens of each kind."""
    draw = np.random.default_rng(0)
    codes = [source[len(source) // 2 :] for source in sources[:count]]
    prompts = [tokenizer.encode(code[:CODE_CHARS]) for code in codes]
    edited = [tokenizer.encode(code.replace("self", "this")) for code in codes]
    later = [tokenizer.encode(code[CODE_CHARS:]) for code in codes]
    table = [f"| {i:4} | item {i} of the list | {i % 7} | ok |\n" for i in range(1000)]
    tables = [tokenizer.encode("".join(table[100 * i : 100 * i + 100])) for i in range(count)]
    shape = count, PROMPT_TOKENS + length
    random = draw.integers(3, tokenizer.vocab_size, shape).tolist()
    return {
        "code, edited": [(own, new[:length]) for own, new in zip(prompts, edited, strict=True)],
        "code, continued": [(own, new[:length]) for own, new in zip(prompts, later, strict=True)],
        "table": [(own[:PROMPT_TOKENS], own[PROMPT_TOKENS:][:length]) for own in tables],
        "random": [(own[:PROMPT_TOKENS], own[PROMPT_TOKENS:]) for own in random],
    }


def compare(
    model: FlashSTU, tokenizer: Tokenizer, pairs: Sequence[Pair], weights: EngineWeights
) -> dict[str, Any]:
    """Return the tokens per second of an engine that guesses and of one that does not."""
    engines = {
        name: _Answering(
            Engine(
                model,
                tokenizer,
                EngineConfig(
                    cache_gib=0.5,
                    prefix_cache_gib=0,
                    weights=weights,
                    speculate="ngram" if name == "speculate" else None,
                ),
            ),
            pairs,
        )
        for name in ("plain", "speculate")
    }
    order = list(engines.values())
    while any(engine.tokens_left for engine in order):
        for engine in order:
            engine.take_turn()
        order.reverse()
    speeds = {f"{name}_tokens_per_second": own.speed for name, own in engines.items()}
    stats = engines["speculate"].engine.stats()
    turns = [engines[name].seconds_a_token for name in ("plain", "speculate")]
    return speeds | {
        "speedup": engines["speculate"].speed / engines["plain"].speed,
        "vain_share": engines["speculate"].vain_share,
        "median_speedup_of_a_turn": statistics.median(map(truediv, *turns)),
        "drafts": stats.spec_decode_num_drafts,
        "draft_tokens": stats.spec_decode_num_draft_tokens,
        "accepted_tokens": stats.spec_decode_num_accepted_tokens,
    }


class _Answering:
    """An engine whose requests decode given answers."""

    def __init__(self, engine: Engine, pairs: Sequence[Pair]) -> None:
        self.engine = engine
        self._answers: dict[int, list[int]] = {}
        self.seconds_a_token: list[float] = []
        """Processor's seconds of each turn, divided by its tokens."""
        self._num_tokens, self._seconds = 0, 0.0
        for prompt, answer in pairs:
            params = SamplingParams(max_new_tokens=len(answer), stop_at_eos=False)
            self._answers[engine.add(Request(prompt, params))] = answer
        self.tokens_left = sum(map(len, self._answers.values()))
        self._places = dict.fromkeys(self._answers, 0)
        choose = engine._chooser.choose

        def chosen(request_ids: Sequence[int], logits: Tensor) -> list[Choice]:
            choices = choose(request_ids, logits)
            places = [self._places[request_id] for request_id in request_ids]
            for request_id in request_ids:
                self._places[request_id] += 1
            return [
                choice._replace(token=self._answers[request_id][place])
                for request_id, choice, place in zip(request_ids, choices, places, strict=True)
            ]

        speculation, self._vain_seconds = engine._speculation, 0.0
        decode = speculation.decode

        def decoded(jobs: Sequence[Job]) -> bool:
            start = time.process_time()
            is_done = decode(jobs)
            if not is_done:
                self._vain_seconds += time.process_time() - start
            return is_done

        patch.object(engine._chooser, "choose", chosen).start()
        patch.object(speculation, "decode", decoded).start()
        whole = self.tokens_left
        while engine.stats().waiting or self.tokens_left == whole:  # prompts are not timed
            self._step()
        self._vain_seconds = 0.0

    @property
    def vain_share(self) -> float:
        """Share of the time that looking for guesses took in steps without any."""
        return self._vain_seconds / self._seconds

    @property
    def speed(self) -> float:
        """Tokens per second of the processor."""
        return self._num_tokens / self._seconds

    def take_turn(self) -> None:
        """Decode some tokens of every request."""
        start, before = time.process_time(), self.tokens_left
        if not before:
            return
        while self.tokens_left > max(0, before - TURN * len(self._answers)):
            self._step()
        seconds, count = time.process_time() - start, before - self.tokens_left
        self.seconds_a_token.append(seconds / count)
        self._seconds, self._num_tokens = self._seconds + seconds, self._num_tokens + count

    def _step(self) -> None:
        for output in self.engine.step():
            self.tokens_left -= len(output.new_token_ids)
