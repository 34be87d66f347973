"""`stu-generate`: a file of prompts in, a file of completions out."""

import os
import socket
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve.batch.config import BatchConfig
from serve.batch.spool import STANDARD, readable_again
from serve.config import EngineConfig
from stu.common.array_task import ArrayTask
from stu.common.cli import ArgumentParser, run_command

# torch takes a second to import: only `generate` does, after the command line is found valid.
if TYPE_CHECKING:
    from serve.batch.decoder import Report
    from serve.batch.progress import Tally
    from serve.batch.worker import Work


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 0: done; 1: done, and some rows have an error; 2: it could not go on."""

    def decode_rows() -> int:
        config = _parse(argv)
        tally = generate(config)
        return 1 if tally.num_failed else 0

    return run_command("stu-generate", decode_rows, "serve")


def generate(config: BatchConfig) -> "Tally":
    """Decode the rows of `config.input` that `config.output` does not have yet into rows of it, in
    the order in which they end.

    Rows in and out: see `serve.batch.rows.PromptRows` and `serve.batch.openai_rows.OpenAiRows`.
    However the run ends, the rows that are written stay, and the same call goes on from there.

    Raises ValueError or OSError.
    """
    task = ArrayTask.parse(config.part) if config.part else ArrayTask.from_slurm_step(os.environ)
    path = config.output if config.output == STANDARD else task.output(config.output)
    with _naming(task):
        _check_output(config, path)
        with readable_again(config.input, path) as source:
            return _generate(replace(config, input=source), task, path)


def _generate(config: BatchConfig, task: ArrayTask, path: Path) -> "Tally":
    from serve.batch.job import BatchJob, fingerprint_of, open_weights
    from serve.batch.progress import Display, Tally
    from serve.batch.sink import OutputFile, StandardOutput, require_same_job
    from serve.batch.source import InputDigest
    from serve.batch.worker import Work

    devices, job = _devices(config), BatchJob(config, InputDigest.of(config.input))
    decisive = job.model_and_settings()
    identity = {"input": str(job.digest), "part": str(task), **decisive}
    others = [] if path == STANDARD or config.overwrite else task.other_outputs(config.output)
    with (
        open_weights(config.model) as weights,
        StandardOutput()
        if path == STANDARD
        else OutputFile(path, identity, job.row_format.recognise, config.overwrite) as output,
    ):
        loaded = fingerprint_of(weights)
        require_same_job(identity, others)
        tally = Tally(len(output.done), output.num_failed)
        works = [
            Work(
                config,
                device,
                part,
                frozenset(number for number in output.done if number in part),
                job.digest,
                decisive,
            )
            for device, part in zip(devices, task.split(len(devices)), strict=True)
        ]
        reading_error = ""
        try:
            with Display() as display, closing(_reports(works)) as reports:
                for arrived in reports:
                    output.append([line for _, report in arrived for line in report.lines])
                    for engine, report in arrived:
                        tally.add(engine, report)
                        reading_error = reading_error or report.reading_error
                    display.show(tally)
        except (KeyboardInterrupt, SystemExit, OSError):
            if tally.num_done and path != STANDARD:
                print(
                    f"stu-generate: stopped; {path} has {tally.num_done:,} rows, and the same "
                    "command goes on from there",
                    file=sys.stderr,
                )
            raise
        if reading_error:
            raise ValueError(f"{reading_error}; {tally.num_done:,} rows are in {path}")
        # The rows are those of the old input even so, for it was compared while it was read.
        job.digest.check(config.input)
        # Weights may be mapped from the disk. A model that is replaced by another file, as
        # stu-export does, stays as it is for those who have it open.
        if fingerprint_of(weights) != loaded:
            reason = (
                f"model {config.model}: model.safetensors was written over while it was decoded "
                "with, and rows may be of both models: begin anew with --overwrite"
            )
            output.condemn(reason)
            raise ValueError(reason)
        require_same_job(identity, others)
    print(f"{tally}; wrote {path}", file=sys.stderr)
    return tally


def _devices(config: BatchConfig) -> list[str]:
    from serve.devices import choose_devices

    devices = choose_devices(config.devices)
    if len(set(devices)) < len(devices) and config.engine.cache_gib is None:
        raise ValueError(
            f"devices={config.devices!r} names one twice, and each process would take half of its "
            "free memory: give cache_gib"
        )
    return devices


def _reports(
    works: Sequence["Work"],
) -> Generator[list[tuple[int, "Report"]], None, None]:
    """Of one engine in this process, or of several in others: a list of what there is now."""
    from serve.batch.worker import decode
    from serve.batch.workers import Workers

    if len(works) == 1:
        yield from ([(0, report)] for report in decode(works[0]))
    else:
        with Workers(works) as workers:
            yield from workers.reports()


def _check_output(config: BatchConfig, path: Path) -> None:
    if path == STANDARD:
        return
    if config.input.is_dir() and config.input.resolve() in path.resolve().parents:
        raise ValueError(f"output {path}: lies in the input {config.input}; choose another folder")
    if not path.parent.is_dir():
        raise ValueError(f"output {path}: there is no folder {path.parent}; make it first")
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"output {path}: is not a file; choose another, or - for standard output")
    if config.input.exists() and path.samefile(config.input):
        raise ValueError(f"output {path}: is the input; choose another")


@contextmanager
def _naming(task: ArrayTask) -> Iterator[None]:
    """Errors tell which of many runs they are of."""
    try:
        yield
    except (ValueError, OSError) as error:
        if task.count == 1:
            raise
        raise ValueError(f"part {task} on {socket.gethostname()}: {error}") from error


def _parse(argv: Sequence[str] | None) -> BatchConfig:
    parser = ArgumentParser(
        prog="stu-generate",
        description="Decode a file of prompts with the model of a model directory. Input: a JSON "
        'object a line, {"prompt": "..."}, with an "id" if you like, and any of the settings '
        "max-new-tokens to stop-at-eos (with _ for -) for that row alone; or the lines of OpenAI's "
        "batch format, for /v1/completions and /v1/chat/completions; or Parquet. - is standard "
        "input. Output: a line for each, in any order. A "
        "run that was stopped, or killed, goes on when the same command is given again. Exits with "
        "1 if a row could not be decoded; its line says why.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder of stu-export")
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_settings(BatchConfig)
    given = parser.parse_args(argv).as_dict()
    del given["config"]
    engine = {field.name: given.pop(field.name) for field in fields(EngineConfig)}
    return BatchConfig(**given, engine=EngineConfig(**engine))


if __name__ == "__main__":
    sys.exit(main())
