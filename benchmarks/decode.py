"""`stu-bench decode`: the engine with five convolution caches, and other language models.

All requests of a batch start together after prompts of the same length. A run of 32,768 tokens by
direct sums takes hours, so steps are timed at positions spread over the run, where the caches are
set to as if the run had come there, and so is a flush of each tile size or epoch length; a run's
time is their sum, each weighted by how often it occurs. `--whole` runs every step of our caches
instead.

Our caches: `naive`, direct sums which read even lags only and make no temporaries; `epoched` and
`continuous` FutureFill of `stu.futurefill`; `flashinference`, the same tiles over prompt and
generation (`benchmarks.flash_inference`); `paged`, the engine's own. They give the same tokens.
Peers (`benchmarks.peers`) have as many parameters as our model, but are run without scheduler and
text. What does not fit into memory is not attempted.
"""

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import psutil
import torch
from tqdm import tqdm

from benchmarks import convolution_costs
from benchmarks.costs import FLOAT_BYTES, Costs, window_costs
from benchmarks.decode_engine import VOCAB_SIZE, other_bytes
from benchmarks.decode_plot import plot
from benchmarks.decode_subjects import EngineSubject, PeerSubject, Subject
from benchmarks.energy import UNAVAILABLE
from benchmarks.machine import describe
from benchmarks.operations import operations
from benchmarks.peers import Peer, build_peers
from benchmarks.rates import Rates, mean_rates, measured_rates
from benchmarks.samples import Sample, sampled, summary
from stu.config import ModelConfig
from stu.layers import LongConvolution
from stu.model import FlashSTU

SHARE_OF_MEMORY = 0.75
"""Of what is free, that a cache may take: filters and their spectra take some GiB besides."""
GIB = 2**30


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every combination of the settings, and each cache's ratio to the paged one."""
    if args.whole and len(args.threads) > 1:
        raise ValueError("--whole decodes to the end, once: give one number of --threads")
    result: dict[str, Any] = {"machine": describe(), "runs": []}
    num_models = len(args.layout) * len(args.mlp_ratio) * len(args.new_tokens)
    num_subjects = num_models * len(args.batch) * (len(args.caches) + len(args.peers))
    progress = tqdm(total=num_subjects, unit=" caches and peers", smoothing=0)
    for layout, mlp_ratio in itertools.product(args.layout, args.mlp_ratio):
        peers: dict[str, Peer] = {}
        for new_tokens in args.new_tokens:
            torch.manual_seed(0)
            config = ModelConfig(
                vocab_size=VOCAB_SIZE,
                width=args.width,
                layout=layout,
                mlp_ratio=mlp_ratio,
                max_seq_len=args.prompt_tokens + new_tokens,
            )
            model = FlashSTU(config).eval()
            peers = peers or build_peers(args.peers, config, model.num_parameters())
            for batch in args.batch:
                subjects = [
                    partial(run_cache, model, cache, batch, new_tokens, args)
                    for cache in args.caches
                ]
                subjects += [
                    partial(run_peer, name, peer, config, batch, new_tokens, args)
                    for name, peer in peers.items()
                ]
                runs: list[dict[str, Any]] = []
                for runs_of_threads in subjects:
                    runs += runs_of_threads()
                    progress.update()
                result["runs"] += compared(runs)
                if args.output:
                    text = json.dumps(result, indent=1) + "\n"
                    args.output.write_text(text, encoding="utf-8")
    progress.close()
    if args.plot:
        plot(result, args.plot)
    return result


def run_cache(
    model: FlashSTU, cache: str, batch: int, new_tokens: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Of one of our caches, a result for each number of threads."""
    config, num_parameters = model.config, model.num_parameters()
    lag_step = next(its.lag_step for its in model.modules() if isinstance(its, LongConvolution))
    shape = convolution_costs.Shape(
        layers=len(config.convolution_layers),
        width=config.width,
        lag_step=lag_step,
        num_taps=-(-config.max_seq_len // lag_step),
        batch=batch,
        prompt_tokens=args.prompt_tokens,
        new_tokens=new_tokens,
        page_len=args.page_len,
    )
    others = other_bytes(config, batch, args.page_len)
    num_bytes = convolution_costs.cache_bytes(cache, shape) + others
    needed = num_bytes
    if cache == "naive":  # half of its buffer is room for longer prompts, which stays unused
        room = shape.num_taps - shape.columns(args.prompt_tokens)
        needed += room * shape.layers * shape.width * lag_step * batch * FLOAT_BYTES
    setting = described(config, args, cache, batch, new_tokens, num_parameters, num_bytes)

    def begin() -> tuple[Subject, Costs]:
        subject = EngineSubject(
            model, cache, batch, args.prompt_tokens, new_tokens, args.page_len, args.whole
        )
        if cache == "paged":
            counts = convolution_costs.paged(shape, subject.engine._caches.convolution._tiles)
        else:
            counts = convolution_costs.LOCKSTEP[cache](shape)
        windows = window_costs(config, args.prompt_tokens, new_tokens)
        return subject, convolution_costs.added(windows, counts.costs(shape))

    yield from timed_runs(setting, needed, begin, args, whole=args.whole)


def run_peer(
    name: str,
    peer: Peer,
    config: ModelConfig,
    batch: int,
    new_tokens: int,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Of a peer, a result for each number of threads."""
    positions = range(args.prompt_tokens, args.prompt_tokens + new_tokens)
    num_bytes = peer.cache_bytes(batch, positions.stop)
    setting = described(config, args, name, batch, new_tokens, peer.num_parameters, num_bytes)
    setting["note"] = peer.note

    def begin() -> tuple[Subject, Costs]:
        return PeerSubject(peer, batch, args.prompt_tokens, new_tokens), peer.costs(positions)

    yield from timed_runs(setting, num_bytes, begin, args, whole=False)
    peer.start(1, 1)  # gives the large cache back


def timed_runs(
    setting: dict[str, Any], needed: int, begin: Any, args: argparse.Namespace, whole: bool
) -> Iterator[dict[str, Any]]:
    """For each number of threads, milliseconds of a step on average, and what they are spent on."""
    gc.collect()  # the subject before this one, of many gigabytes
    if needed > SHARE_OF_MEMORY * psutil.virtual_memory().available:
        run = setting | {"not_run": f"does not fit: {needed / GIB:.1f} GiB"}
        tqdm.write(str(run), file=sys.stderr)
        yield run
        return
    torch.set_num_threads(max(args.threads))
    subject, costs = begin()
    gc.collect()
    gc.freeze()  # or a step in a hundred waits for a collection of all that was ever imported
    batch, new_tokens = setting["batch"], setting["new_tokens"]
    for threads in args.threads:
        torch.set_num_threads(threads)
        rates: list[Rates] = []

        def beside() -> None:
            rates.append(measured_rates(batch))  # noqa: B023, called within the loop

        for _ in range(subject.warm_up_steps):
            subject.step()
        if whole:
            # The first token comes with the prompt, and after the last the batch is gone.
            left = new_tokens - 3 - subject.warm_up_steps  # and one is left to count operations of
            beside()
            samples = [Sample(1.0, subject.step()) for _ in range(left)]
            beside()
        else:
            samples = sampled(subject, new_tokens, beside)
        run = setting | {"threads": threads} | summary(samples)
        run["tokens_per_second"] = 1e3 * batch / run["step_ms"]
        joules = run.pop("joules_per_step", None)
        run["joules_per_token"] = UNAVAILABLE if joules is None else joules / batch
        run |= costs.report(FLOAT_BYTES * setting["parameters"], batch)
        run["operations_per_step"] = operations(subject.step)
        run["rates"] = asdict(mean_rates(rates))
        tqdm.write(str({name: shown(value) for name, value in run.items()}), file=sys.stderr)
        yield run
    gc.unfreeze()


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
        "layout": config.layout,
        "width": config.width,
        "mlp_ratio": config.mlp_ratio,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "cache": cache,
        "parameters": num_parameters,
        "cache_bytes": num_bytes,
    }


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every time over the paged cache's, in the same setting."""
    timed = [run for run in runs if "step_ms" in run]
    paged = {run["threads"]: run for run in timed if run["cache"] == "paged"}
    for run in timed:
        if run["cache"] != "paged" and run["threads"] in paged:
            reference = paged[run["threads"]]
            for part in ("step", "convolution"):
                if f"{part}_ms" in run:
                    run[f"{part}_over_paged"] = run[f"{part}_ms"] / reference[f"{part}_ms"]
    return runs


def shown(value: Any) -> Any:
    """To three digits."""
    if isinstance(value, dict):
        return {name: shown(its) for name, its in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value
