"""`python -m benchmarks peers`: our engine and server against llama.cpp and vLLM.

Peers have a Llama-like model with as many parameters as ours; all have random weights. They come
from the package registry into environments of their own, and one that cannot be installed is left
out. Every measurement is a process, and programs take turns. Each is written to a file as soon as
it is done. A second start with that file measures what it lacks and returns all that is in it, so a
result may come from several starts with different options.

Sequences of a batch share a prompt, which each program reads once and remembers. Ours and vLLM
sample at temperature 1; llama.cpp's benchmark feeds random tokens.
"""

import asyncio
import itertools
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from benchmarks.decoding.sampling import max_cache_bytes
from benchmarks.machine import describe
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.ours import Ours
from benchmarks.peers.program import Figures, Program, ProgramError, Work
from benchmarks.peers.vllm_cpu import Vllm
from benchmarks.serving.load import ServerError, load, resident_mib
from stu.common.errors import UserError
from stu.common.files import cache_folder, new_file, read_json_object
from stu.config import ModelConfig
from train.flops import num_parameters

PROGRAMS: dict[str, Callable[[Work], Program]] = {
    "ours": lambda work: Ours(work, "float"),
    "ours_bf16": lambda work: Ours(work, "float", "bfloat16"),
    "ours_int8": lambda work: Ours(work, "int8"),
    "llama_cpp_f32": lambda work: LlamaCpp(work, "f32"),
    "llama_cpp_bf16": lambda work: LlamaCpp(work, "bf16"),
    "llama_cpp_q8_0": lambda work: LlamaCpp(work, "q8_0"),
    "vllm": Vllm,
    "vllm_bf16": lambda work: Vllm(work, "bfloat16"),
    "vllm_int8": lambda work: Vllm(work, "bfloat16", int8=True),
}
PROMPT, NEW = (32, 512), (32, 256)
"""Fewest and most tokens of prompts, and new ones, of requests to servers."""
MOST_SERVED = PROMPT[1] + NEW[1] + 1
WARM_REQUESTS = 4
HEAD: tuple[str, ...] = ("part", "width", "layers", "vocab_size", "max_seq_len", "threads")
HEAD += ("context", "batch", "new_tokens", "clients", "requests")
SHOWN = ("part", "program", "context", "batch", "clients", "round")


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    context: tuple[PositiveInt, ...] = (512, 2048, 8192, 32768)
    """Prompt tokens of each sequence, after which it decodes."""
    batch: tuple[PositiveInt, ...] = (1, 8, 32)
    """Sequences that decode together, for example [1,8]."""
    programs: tuple[str, ...] = tuple(PROGRAMS)
    """Programs to compare: ours and vllm in float32, others as they are named: ours_bf16, ours_int8
    (weights of 8 bits), llama_cpp_f32, llama_cpp_bf16, llama_cpp_q8_0, vllm_bf16,
    vllm_int8."""
    new_tokens: PositiveInt = 64
    """Timed steps of each batch."""
    parts: tuple[Literal["decode", "serve"], ...] = ("decode", "serve")
    """Parts: decode, batches of one length; serve, streams of mixed lengths by OpenAI's API."""
    clients: PositiveInt = 64
    """Streams that a server decodes at a time."""
    requests: PositiveInt = 128
    """Requests to a server."""
    width: PositiveInt = 1024
    """Width of the models."""
    layers: PositiveInt = 8
    """Blocks of the models."""
    vocab_size: PositiveInt = 4096
    """Tokens of the models."""
    max_seq_len: PositiveInt = 2**15 + 2**8
    """Longest context of the models, which all measurements of a file should share."""
    rounds: PositiveInt = 2
    """Rounds of all programs in turn."""
    peer_folder: Path | None = None
    """Folder of environments and model files, which take 6 GB. null: ~/.cache/stu/peers."""
    install: bool = True
    """Install peers that are not there. false: leave them out."""
    progress: Path = Path("runs/peers.json")
    """File that every measurement is added to. A second start, of the same commit on the same
    machine, measures only what it lacks, and returns all. Other contexts, batches, programs, parts
    and rounds are added."""


def measure(options: Options) -> dict[str, Any]:
    """Measure what the file lacks, and return the medians of all rounds in it."""
    settings = [*chosen(options)]
    for name in options.programs:
        if name not in PROGRAMS:
            raise UserError("programs", name, f"some of {', '.join(PROGRAMS)}")
    options.progress.parent.mkdir(parents=True, exist_ok=True)
    shared = shared_settings(options)
    result: dict[str, Any] = {"machine": describe(), "settings": shared, "measured": []}
    if options.progress.exists():
        result, started = read_json_object(options.progress), result
        for part in ("machine", "settings"):
            for name in started[part].keys() - {"date"}:
                here, there = started[part][name], result[part][name]
                if here != there:
                    allowed = f"a file of {name} {here}, and not {there}, or a new one"
                    raise UserError("progress", str(options.progress), allowed)
    programs = prepared(options)
    turns = list(itertools.product(settings, range(options.rounds), programs))
    max_bytes = max_cache_bytes()
    for setting, turn, name in tqdm(turns, unit=" measurements", smoothing=0):
        head = setting | {"program": name, "round": turn}
        if any(head.items() <= measurement.items() for measurement in result["measured"]):
            continue
        figures = measured(programs[name], setting, max_bytes)
        if figures:
            tqdm.write(f"{described(head)}: {json.dumps(figures)}", file=sys.stderr)
            result["measured"].append(head | figures)
            with new_file(options.progress) as path:
                path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return {"machine": result["machine"], "runs": compared(merged(result["measured"]))}


def shared_settings(options: Options) -> dict[str, int]:
    """Return the settings that all measurements of a file share."""
    names = "width", "layers", "vocab_size", "max_seq_len", "new_tokens", "clients", "requests"
    return {name: getattr(options, name) for name in names} | {"threads": torch.get_num_threads()}


def chosen(options: Options) -> Iterator[dict[str, Any]]:
    """Yield the settings in which programs are compared."""
    shared = shared_settings(options)
    steps = {"new_tokens": shared.pop("new_tokens")}
    load = {name: shared.pop(name) for name in ("clients", "requests")}
    if "decode" in options.parts:
        for context, batch in itertools.product(options.context, options.batch):
            yield {"part": "decode", "context": context, "batch": batch} | steps | shared
    if "serve" in options.parts:
        yield {"part": "serve"} | load | shared


def prepared(options: Options) -> dict[str, Program]:
    """Return the programs that can be had, and say which cannot."""
    longest = max(max(options.context) + options.new_tokens + max(options.batch) + 1, MOST_SERVED)
    if longest > options.max_seq_len:
        raise UserError(
            "max-seq-len", options.max_seq_len, f"at least {longest} for these settings"
        )
    sizes = {"width": options.width, "num_layers": options.layers}
    shape = ModelConfig(options.vocab_size, layout="stu", max_seq_len=options.max_seq_len, **sizes)
    folder = options.peer_folder or cache_folder() / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    work = Work(
        shape, num_parameters(shape), options.new_tokens, threads, folder.resolve(), options.install
    )
    programs: dict[str, Program] = {}
    for name in options.programs:
        program = PROGRAMS[name](work)
        try:
            program.prepare()
        except UserError as error:
            tqdm.write(f"{name} is left out: {error}", file=sys.stderr)
        else:
            programs[name] = program
    return programs


def measured(program: Program, setting: Mapping[str, Any], max_bytes: float) -> Figures:
    """Return the figures of a program, or none if it serves nothing or its cache does not fit."""
    try:
        if setting["part"] == "serve":
            return served(program, setting["clients"], setting["requests"])
        context, batch = setting["context"], setting["batch"]
        size = program.sequence_bytes(context + setting["new_tokens"])
        if batch * size > max_bytes:
            return {}
        return {"sequence_bytes": size} | program.decode(context, batch)
    except ProgramError as error:
        tqdm.write(f"{type(program).__name__}, {described(setting)}: {error}", file=sys.stderr)
        return {}


def served(program: Program, clients: int, requests: int) -> Figures:
    """Return the figures of a server, after a few requests to warm up. Raises ProgramError."""
    if not program.serves:
        return {}
    try:
        with program.serving(clients) as (url, pid):
            vocab_size = program.work.shape.vocab_size
            asyncio.run(load(url, mixed(WARM_REQUESTS, vocab_size, seed=1), WARM_REQUESTS))
            figures = asyncio.run(load(url, mixed(requests, vocab_size, seed=0), clients))
            return figures | {"resident_mib": resident_mib(pid)}
    except (ServerError, psutil.NoSuchProcess) as error:
        raise ProgramError(f"its server: {error}") from error


def mixed(requests: int, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    """Return random prompts, and numbers of new tokens; the logarithms of lengths are even."""
    draw = random.Random(seed)

    def length(shortest: int, longest: int) -> int:
        return int(shortest * (longest / shortest) ** draw.random() + 0.5)

    return [
        ([draw.randrange(2, vocab_size) for _ in range(length(*PROMPT))], length(*NEW))
        for _ in range(requests)
    ]


def merged(measurements: Sequence[Figures]) -> list[Figures]:
    """Return the medians over the rounds of each program in each setting, in the order of the
    settings."""
    rounds: dict[tuple[Any, ...], list[Figures]] = {}
    for own in sorted(measurements, key=lambda own: [own.get(key, 0) for key in HEAD]):
        rounds.setdefault(tuple(own.get(key) for key in (*HEAD, "program")), []).append(own)
    return [median(own) for own in rounds.values()]


def median(rounds: Sequence[Figures]) -> Figures:
    """Return the median of each figure of a program in a setting."""
    head = {key: rounds[0][key] for key in (*HEAD, "program") if key in rounds[0]}
    figures = rounds[0].keys() - head.keys() - {"round"}
    run = head | {key: statistics.median(own[key] for own in rounds) for key in sorted(figures)}
    if run["part"] == "decode":
        run["tokens_per_second"] = 1e3 * run["batch"] / run["step_ms"]
    return run | {"speed_by_round": {str(own["round"]): speed(own) for own in rounds}}


def speed(measurement: Figures) -> float:
    """Return new tokens a second."""
    if measurement["part"] == "serve":
        return float(measurement["output_throughput"])
    return float(1e3 * measurement["batch"] / measurement["step_ms"])


def compared(runs: list[Figures]) -> list[Figures]:
    """Add to each run how many times as fast ours is, with each format of weights: the median over
    the rounds of both."""
    for run in runs:
        setting = {key: run[key] for key in HEAD if key in run}
        for ours in ("ours", "ours_int8"):
            wanted = setting | {"program": ours}
            for other in (other for other in runs if wanted.items() <= other.items()):
                own, reference = run["speed_by_round"], other["speed_by_round"]
                ratios = [reference[turn] / own[turn] for turn in own.keys() & reference.keys()]
                if ratios:
                    run[f"{ours}_times_as_fast"] = statistics.median(ratios)
    return runs


def described(setting: Mapping[str, Any]) -> str:
    """Return a setting for people."""
    return ", ".join(f"{name} {setting[name]}" for name in SHOWN if name in setting)
