"""`python -m benchmarks decode`: our model with five convolution caches, and other models.

All sequences of a batch start together, after prompts of the same length. Caches
(`benchmarks.decoding.caches`) and peers (`benchmarks.peers`), which have as many parameters as our
model, take turns. Steps run the bare models, with the matrices and caches that the engine
uses, and greedy choices; `benchmarks.decoding.sampling` says which are timed. A cache that does not
fit into memory is reported and not run.
"""

import itertools
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from benchmarks.decoding.caches import CACHES, OURS, cache_bytes
from benchmarks.decoding.sampling import LEAST_NEW_TOKENS, Candidate, max_cache_bytes, timed_runs
from benchmarks.decoding.shape import Shape
from benchmarks.decoding.subjects import CacheSubject, PeerSubject
from benchmarks.machine import describe
from benchmarks.peers import PEERS, build_peers
from benchmarks.peers.peer import Peer
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.layouts import layout_names
from stu.model import FlashSTU

VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark; every combination of the lists is run."""

    batch: tuple[PositiveInt, ...] = (1, 8, 32, 64)
    """Sequences that decode together, for example [1,8]."""
    new_tokens: tuple[PositiveInt, ...] = (512, 2048, 8192, 32768)
    """New tokens of each sequence."""
    prompt_tokens: PositiveInt = 512
    """Prompt tokens of each sequence."""
    width: PositiveInt = 1024
    """Width of the models."""
    layers: PositiveInt = 8
    """Blocks of our model."""
    layout: tuple[str, ...] = ("stu",)
    """Layouts of our model."""
    caches: tuple[str, ...] = tuple(name for name in CACHES if name != "ours_int8")
    """Convolution caches to compare; ours_int8 is ours beside weights of 8 bits."""
    peers: tuple[str, ...] = ()
    """Other models: llama, llama_grouped, mamba2, rwkv, which need the extra bench, s4."""
    rounds: PositiveInt = 3
    """Rounds of all caches and peers in turn."""


def measure(options: Options) -> dict[str, Any]:
    """Measure every combination of the settings, and each cache's ratio to ours."""
    check(options)
    runs: list[dict[str, Any]] = []
    models = list(itertools.product(options.layout, options.new_tokens))
    num_subjects = len(models) * len(options.batch) * (len(options.caches) + len(options.peers))
    unit = " rounds of a cache or peer"
    progress = tqdm(total=options.rounds * num_subjects, unit=unit, smoothing=0)
    peers: dict[str, Peer] = {}
    max_bytes = 0.0
    for layout, new_tokens in models:
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=VOCAB_SIZE,
            width=options.width,
            num_layers=options.layers,
            layout=layout,
            max_seq_len=options.prompt_tokens + new_tokens,
        )
        model = FlashSTU(config).eval()
        peers = peers or build_peers(options.peers, config, model.num_parameters())
        # Later on, this process may hold on to memory that it does not use.
        max_bytes = max_bytes or max_cache_bytes()
        for batch in options.batch:
            shape = Shape(config, batch, options.prompt_tokens, new_tokens)
            candidates = [of_cache(model, cache, shape, options) for cache in options.caches]
            candidates += [of_peer(name, shape, peers[name], options) for name in peers]
            runs += compared(timed_runs(candidates, options.rounds, max_bytes, progress))
    progress.close()
    return {"machine": describe(), "runs": runs}


def check(options: Options) -> None:
    """Raise UserError for settings that cannot be measured."""
    for field, allowed in {"layout": layout_names(), "caches": CACHES, "peers": PEERS}.items():
        for value in getattr(options, field):
            if value not in allowed:
                raise UserError(field, value, f"some of {', '.join(allowed)}")
    if min(options.new_tokens) < LEAST_NEW_TOKENS:
        raise UserError("new-tokens", min(options.new_tokens), f"at least {LEAST_NEW_TOKENS}")


def of_cache(model: FlashSTU, cache: str, shape: Shape, options: Options) -> Candidate:
    """Return our model with one of its caches."""
    num_bytes = cache_bytes(cache, model, shape) + shape.other_bytes()
    head = described(cache, shape, options, model.num_parameters(), num_bytes)
    head["weights"] = OURS.get(cache, "float")
    return Candidate(head, lambda: CacheSubject(model, cache, shape))


def of_peer(name: str, shape: Shape, peer: Peer, options: Options) -> Candidate:
    """Return another model."""
    num_bytes = peer.cache_bytes(shape.batch, shape.prompt_tokens + shape.new_tokens)
    setting = described(name, shape, options, peer.num_parameters, num_bytes)
    return Candidate(setting, lambda: PeerSubject(peer, shape), lambda: peer.start(1, 1))


def described(
    cache: str, shape: Shape, options: Options, num_parameters: int, num_bytes: int
) -> dict[str, Any]:
    """Return the head of a run. cache: name of a cache or a peer."""
    config, own = shape.config, ("prompt_tokens", "new_tokens", "batch")
    head = {name: getattr(options, name) for name in ("width", "layers")}
    head |= {"layout": config.layout, "mlp_ratio": config.mlp_ratio}
    head |= {name: getattr(shape, name) for name in own}
    return head | {"cache": cache, "parameters": num_parameters, "cache_bytes": num_bytes}


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each run of a setting its times over those of our cache."""
    timed = {run["cache"]: run for run in runs if "step_ms" in run}
    ours = timed.pop("ours", {})
    for run in timed.values() if ours else ():
        rounds = zip(run["step_ms_by_round"], ours["step_ms_by_round"], strict=True)
        run["step_over_ours_by_round"] = [own / reference for own, reference in rounds]
        run["step_over_ours"] = statistics.median(run["step_over_ours_by_round"])
        if "convolution_ms" in run:
            run["convolution_over_ours"] = run["convolution_ms"] / ours["convolution_ms"]
    return runs
