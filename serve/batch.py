"""`stu-generate`: a file of prompts in, a file of completions out."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from stu.arguments import ArgumentParser, run_command
from stu.atomic import new_file

# torch takes a second to import: only `generate` does, after the command line is found valid.
if TYPE_CHECKING:
    from serve.rows import Request
    from stu.model import FlashSTU
    from stu.tokenizer import Tokenizer

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BatchConfig:
    """What `stu-generate` reads and writes. Settings that are None are the model directory's."""

    model: Path
    """Model directory."""
    input: Path
    """JSONL file of prompts."""
    output: Path
    """JSONL file of completions to write."""
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    """Default 0."""
    batch_size: int = 32
    """Rows decoded together. It changes completions only where rounding tips a random choice."""
    stop_at_eos: bool = True
    """End a completion at the token that ends a document."""
    device: Device = "auto"
    """`auto`: CUDA where there is one."""
    dtype: Dtype = "float32"
    """Of the weights."""
    overwrite: bool = False
    """Replace `output` if it exists."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is not allowed: it must be >= 1")


@dataclass
class Totals:
    """What a run has done."""

    num_rows: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Of decoding; loading the model is not counted."""

    def __str__(self) -> str:
        failed = f" ({self.num_failed:,} of them with an error)" if self.num_failed else ""
        speed = self.num_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.num_rows:,} rows{failed}, {self.num_tokens:,} tokens in {self.seconds:.1f} s, "
            f"{speed:,.0f} tokens/s"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 0: done; 1: some rows have an error; 2: nothing was written."""

    def decode_rows() -> int:
        config = _parse(argv)
        totals = generate(config)
        print(f"{totals}; wrote {config.output}", file=sys.stderr)
        return 1 if totals.num_failed else 0

    return run_command("stu-generate", decode_rows)


def generate(config: BatchConfig) -> Totals:
    """Decode every row of `config.input` into a row of `config.output`, in the same order.

    Rows in: see `serve.rows.read_rows`. Rows out: `{"id", "prompt", "completion",
    "num_prompt_tokens", "num_completion_tokens", "finish_reason"}`; the prompt's tokens count BOS,
    the completion's not the EOS that stopped it. A row that cannot be decoded: `{"id", "error"}`.

    Raises ValueError or OSError, and then leaves nothing behind.
    """
    _check_output(config)
    import torch

    from serve.rows import SETTINGS, Request, read_rows
    from stu.checkpoint import load_config, load_generation, load_model, load_tokenizer

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, and torch sees no CUDA device: choose cpu, or auto")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    tokenizer = load_tokenizer(config.model)
    if tokenizer.bos_id < 0:
        raise ValueError(f"{config.model}/tokenizer.model: has no BOS token to start prompts with")
    given = {name: value for name in SETTINGS if (value := getattr(config, name)) is not None}
    defaults = {"seed": 0, **load_generation(config.model), **given}
    rows = read_rows(config.input, tokenizer, load_config(config.model).max_seq_len, defaults)
    model = load_model(config.model, "cuda" if on_cuda else "cpu", getattr(torch, config.dtype))

    eos_id = tokenizer.eos_id if config.stop_at_eos else None
    totals, start = Totals(num_rows=len(rows)), time.monotonic()
    with (
        new_file(config.output) as temporary,
        temporary.open("w", encoding="utf-8") as file,
        _progress_bar() as progress,
    ):
        to_come = sum(row.max_new_tokens for row in rows if isinstance(row, Request))
        bar = progress.add_task("decoding", total=to_come)
        for first in range(0, len(rows), config.batch_size):
            batch = rows[first : first + config.batch_size]
            requests = [row for row in batch if isinstance(row, Request)]
            decoded = _decode(model, requests, eos_id, partial(progress.advance, bar))
            for row in batch:
                if isinstance(row, Request):
                    ids = next(decoded)
                    written = _completion(row, ids, eos_id, tokenizer)
                    totals.num_tokens += len(ids)
                    to_come -= row.max_new_tokens - len(ids)
                else:
                    written = asdict(row)
                    totals.num_failed += 1
                file.write(json.dumps(written, ensure_ascii=False) + "\n")
            progress.update(bar, total=to_come)
    totals.seconds = time.monotonic() - start
    return totals


def _check_output(config: BatchConfig) -> None:
    output = config.output
    if not output.parent.is_dir():
        raise ValueError(f"output {output}: there is no folder {output.parent}; make it first")
    if not output.exists():
        return
    if not config.overwrite:
        raise ValueError(f"output {output}: exists; choose another, or give --overwrite")
    if not output.is_file():
        raise ValueError(f"output {output}: is not a file; choose another")
    if config.input.exists() and output.samefile(config.input):
        raise ValueError(f"output {output}: is the input; choose another")


def _decode(
    model: "FlashSTU",
    requests: Sequence["Request"],
    eos_id: int | None,
    count_tokens: Callable[[int], object],
) -> Iterator[list[int]]:
    """Each request's new token ids, with the EOS that ended them if it came."""
    from serve.lockstep import Runner
    from serve.sampling import sample

    if not requests:
        return iter(())
    prompts = [its.tokens for its in requests]
    runner = Runner(model, prompts, [its.max_new_tokens for its in requests])
    params = [its.sampling for its in requests]
    completions: list[list[int]] = [[] for _ in requests]
    running = list(range(len(requests)))
    logits = runner.prefill()
    while True:
        places = [len(old) + len(new) for old, new in zip(prompts, completions, strict=True)]
        ids = sample(logits, params, places)
        new = ids.tolist()
        for row in running:
            completions[row].append(new[row])
        count_tokens(len(running))
        running = [
            row
            for row in running
            if new[row] != eos_id and len(completions[row]) < requests[row].max_new_tokens
        ]
        if not running:
            return iter(completions)
        logits = runner.step(ids)


def _completion(
    request: "Request", ids: list[int], eos_id: int | None, tokenizer: "Tokenizer"
) -> dict[str, str | int]:
    stopped = ids[-1] == eos_id
    kept = ids[:-1] if stopped else ids
    # Decoded with the prompt before it: some tokenizers drop the first space of a text.
    text = tokenizer.decode(request.tokens + kept)
    return {
        "id": request.id,
        "prompt": request.prompt,
        "completion": text.removeprefix(tokenizer.decode(request.tokens)),
        "num_prompt_tokens": len(request.tokens),
        "num_completion_tokens": len(kept),
        "finish_reason": "stop" if stopped else "length",
    }


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of at most {task.total:,.0f} tokens"),
        _Speed(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _Speed(ProgressColumn):
    """Tokens per second, lately."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} tokens/s")


def _parse(argv: Sequence[str] | None) -> BatchConfig:
    parser = ArgumentParser(
        prog="stu-generate",
        description="Decode a file of prompts with the model of a model directory. Input: a JSON "
        'object a line, {"prompt": "..."}, with an "id" if you like, and any of the settings '
        "max-new-tokens to seed (with _ for -) for that row alone. Output: a line for each, in the "
        "same order. Exits with 1 if a row could not be decoded; its line says why.",
    )
    default = BatchConfig(model=Path(), input=Path(), output=Path())
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", type=Path, help="folder that stu-export wrote")
    add("--config", action="config", help="YAML file with any of these settings")
    add("--input", metavar="FILE", type=Path, required=True, help="JSONL of prompts")
    add("--output", metavar="FILE", type=Path, required=True, help="JSONL to write")
    add("--max-new-tokens", type=int, help="null: the model directory's; likewise below")
    add("--temperature", type=float, help="0: the most probable token always")
    add("--top-k", type=int, help="choose among so many tokens; 0: all")
    add("--top-p", type=float, help="choose among tokens of this share of probability; 1: all")
    add("--seed", type=int, help="of the random choices; null: 0")
    add("--batch-size", type=int, default=default.batch_size, help="rows decoded together")
    add("--stop-at-eos", type=bool, default=default.stop_at_eos, help="end a completion at EOS")
    add("--device", type=Device, default=default.device, help="auto: CUDA where there is one")
    add("--dtype", type=Dtype, default=default.dtype, help="of the weights")
    add("--overwrite", action="store_true", help="replace the output file")
    given = parser.parse_args(argv).as_dict()
    del given["config"]
    return BatchConfig(**given)


if __name__ == "__main__":
    sys.exit(main())
