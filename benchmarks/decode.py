"""`benchmarks decode`: the engine with five convolution caches, and other language models.

All requests of a batch start together after prompts of the same length. A run of 32,768 tokens by
direct sums takes hours, so steps are timed at positions spread over the run, where the caches are
set to as if the run had come there, and so is a flush of each tile size or epoch length; a run's
time is their sum, each weighted by how often it occurs. `--whole` runs every step of our caches
instead. Caches and peers take turns, several rounds of them (`benchmarks.rounds`).

Our caches: `naive`, direct sums which read even lags only and make no temporaries; `epoched` and
`continuous` FutureFill of `stu.futurefill`; `flashinference`, the same tiles over prompt and
generation (`benchmarks.flash_inference`); `paged`, the engine's own. They give the same tokens.
Peers (`benchmarks.peers`) have as many parameters as our model, but are run without scheduler and
text. What does not fit into memory is not attempted.
"""

import argparse
import itertools
import json
import statistics
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import convolution_costs, heap
from benchmarks.costs import Costs, window_costs
from benchmarks.decode_engine import VOCAB_SIZE, other_bytes
from benchmarks.decode_plot import plot
from benchmarks.decode_subjects import EngineSubject, PeerSubject, Subject
from benchmarks.machine import describe
from benchmarks.peers import Peer, build_peers
from benchmarks.rounds import Candidate, most_cache_bytes, timed_runs
from stu.config import ModelConfig
from stu.mixers import PastInputs, remembered
from stu.model import FlashSTU


@heap.kept()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every combination of the settings, and each cache's ratio to the paged one."""
    if args.whole and len(args.threads) > 1:
        raise ValueError("--whole decodes to the end, once: give one number of --threads")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and torch sees no CUDA device: give cpu")
    if args.peers and args.dtype != "float32":
        raise ValueError(f"--dtype {args.dtype} is of our model alone: leave --peers out")
    result: dict[str, Any] = {"machine": describe(), "runs": []}
    num_models = len(args.layout) * len(args.mlp_ratio) * len(args.new_tokens)
    num_subjects = num_models * len(args.batch) * (len(args.caches) + len(args.peers))
    unit = " rounds of a cache or peer"
    progress = tqdm(total=args.rounds * num_subjects, unit=unit, smoothing=0)
    for layout, mlp_ratio in itertools.product(args.layout, args.mlp_ratio):
        peers: dict[str, Peer] = {}
        most_bytes = 0.0
        for new_tokens in args.new_tokens:
            torch.manual_seed(0)
            config = ModelConfig(
                vocab_size=VOCAB_SIZE,
                width=args.width,
                num_layers=args.layers,
                layout=layout,
                mlp_ratio=mlp_ratio,
                max_seq_len=args.prompt_tokens + new_tokens,
            )
            with torch.device(args.device):
                model = FlashSTU(config).to(getattr(torch, args.dtype)).eval()
                peers = peers or build_peers(args.peers, config, model.num_parameters())
            # Later on, this process may hold on to memory that it does not use.
            most_bytes = most_bytes or most_cache_bytes(args.device)
            for batch in args.batch:
                candidates = [
                    of_cache(model, cache, batch, new_tokens, args) for cache in args.caches
                ]
                candidates += [
                    of_peer(name, peer, config, batch, new_tokens, args)
                    for name, peer in peers.items()
                ]
                runs = timed_runs(candidates, args.threads, args.rounds, most_bytes, progress)
                result["runs"] += compared(runs)
                if args.output:
                    text = json.dumps(result, indent=1) + "\n"
                    args.output.write_text(text, encoding="utf-8")
    progress.close()
    if args.plot:
        if not any("step_ms" in run for run in result["runs"]):
            raise ValueError("--plot: nothing fits into this machine's memory, or is there to draw")
        plot(result, args.plot)
    return result


def of_cache(
    model: FlashSTU, cache: str, batch: int, new_tokens: int, args: argparse.Namespace
) -> Candidate:
    """One of our caches."""
    config, num_parameters = model.config, model.num_parameters()
    past = remembered(model.mixers, PastInputs)
    lag_step = past[0].lag_step
    shape = convolution_costs.Shape(
        layers=len(past),
        width=config.width,
        lag_step=lag_step,
        num_taps=-(-config.max_seq_len // lag_step),
        batch=batch,
        prompt_tokens=args.prompt_tokens,
        new_tokens=new_tokens,
        page_len=args.page_len,
    )
    num_bytes = convolution_costs.cache_bytes(cache, shape)
    number_bytes = getattr(torch, args.dtype).itemsize
    num_bytes += other_bytes(config, batch, args.page_len, number_bytes)

    def begin() -> tuple[Subject, Costs]:
        subject = EngineSubject(
            model, cache, batch, args.prompt_tokens, new_tokens, args.page_len, args.whole
        )
        if cache == "paged":
            counts = convolution_costs.paged(shape, subject.engine._caches.convolution._tiles)
        else:
            counts = convolution_costs.LOCKSTEP[cache](shape)
        windows = window_costs(config, args.prompt_tokens, new_tokens, number_bytes)
        return subject, convolution_costs.added(windows, counts.costs(shape))

    setting = described(config, args, cache, batch, new_tokens, num_parameters, num_bytes)
    return Candidate(setting, begin, lambda: None, args.whole)


def of_peer(
    name: str,
    peer: Peer,
    config: ModelConfig,
    batch: int,
    new_tokens: int,
    args: argparse.Namespace,
) -> Candidate:
    """Another model."""
    positions = range(args.prompt_tokens, args.prompt_tokens + new_tokens)
    num_bytes = peer.cache_bytes(batch, positions.stop)
    setting = described(config, args, name, batch, new_tokens, peer.num_parameters, num_bytes)
    setting["note"] = peer.note

    def begin() -> tuple[Subject, Costs]:
        subject = PeerSubject(peer, batch, args.prompt_tokens, new_tokens, args.device)
        return subject, peer.costs(positions)

    return Candidate(setting, begin, lambda: peer.start(1, 1))


def described(
    config: ModelConfig,
    args: argparse.Namespace,
    cache: str,
    batch: int,
    new_tokens: int,
    num_parameters: int,
    num_bytes: int,
) -> dict[str, Any]:
    """The head of a run: of a peer, `cache` is its name."""
    return {
        "device": args.device,
        "dtype": args.dtype,
        "layout": config.layout,
        "width": config.width,
        "layers": config.num_layers,
        "mlp_ratio": config.mlp_ratio,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "cache": cache,
        "parameters": num_parameters,
        "cache_bytes": num_bytes,
    }


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every time over the paged cache's, in the same setting: and of steps, in every round."""
    timed = [run for run in runs if "step_ms" in run]
    paged = {run["threads"]: run for run in timed if run["cache"] == "paged"}
    for run in timed:
        if run["cache"] == "paged" or run["threads"] not in paged:
            continue
        reference = paged[run["threads"]]
        rounds = zip(run["step_ms_by_round"], reference["step_ms_by_round"], strict=True)
        run["step_over_paged_by_round"] = [its / theirs for its, theirs in rounds]
        run["step_over_paged"] = statistics.median(run["step_over_paged_by_round"])
        if "convolution_ms" in run:
            run["convolution_over_paged"] = run["convolution_ms"] / reference["convolution_ms"]
    return runs
