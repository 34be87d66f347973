"""`stu-generate`: decode a file of prompts into a file of completions."""

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve.batch.config import BatchConfig
from serve.batch.spool import STANDARD, rereadable
from serve.config import EngineConfig
from stu.common.array_task import ArrayTask
from stu.common.cli import ArgumentParser, exit_if_terminated, run_command
from stu.common.errors import UserError, requires_extra

# torch takes a second to import: `generate` imports it once the command line is checked.
if TYPE_CHECKING:
    from serve.batch.engines import Engines
    from serve.batch.progress import Tally


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if all rows are decoded, 1 if some have an error, 2 if the run
    could not finish."""

    def decode_rows() -> int:
        config = _parse(argv)
        tally = generate(config)
        return 1 if tally.num_failed else 0

    return run_command("stu-generate", decode_rows, "serve", BatchConfig)


def generate(config: BatchConfig) -> "Tally":
    """Decode the rows of `config.input` that `config.output` does not have yet, and append them to
    it in the order in which they end.

    `serve.batch.rows.PromptRows` and `serve.batch.openai_rows.OpenAiRows` define the rows. However
    the run ends, written rows stay, and the same call resumes.

    Raises UserError or OSError.
    """
    task = ArrayTask.parse(config.part) if config.part else ArrayTask.from_slurm_step(os.environ)
    path = config.output if config.output == STANDARD else task.output(config.output)
    with _naming(task):
        _check_output(config, path)
        with rereadable(config.input, path) as source:
            return _generate(replace(config, input=source), task, path)


def _generate(config: BatchConfig, task: ArrayTask, path: Path) -> "Tally":
    from serve.batch.job import fingerprint_of, open_weights
    from serve.batch.progress import Display, Tally
    from serve.batch.sink import OutputFile, StandardOutput, require_same_job

    exit_if_terminated()
    engines = _engines(config, task)
    identity = {"input": str(engines.job.digest), "part": str(task), **engines.decisive}
    others = [] if path == STANDARD or config.overwrite else task.other_outputs(config.output)
    recognise = engines.job.row_format.recognise
    with (
        open_weights(config.model) as weights,
        StandardOutput()
        if path == STANDARD
        else OutputFile(path, identity, recognise, config.overwrite) as output,
    ):
        loaded = fingerprint_of(weights)
        require_same_job(identity, others)
        tally = Tally(len(output.done), output.num_failed, counts_prompts=config.score)
        reading_error = ""
        try:
            with Display() as display, closing(engines.reports(output.done)) as reports:
                for arrived in reports:
                    output.append([line for _, report in arrived for line in report.lines])
                    for engine, report in arrived:
                        tally.add(engine, report)
                        reading_error = reading_error or report.reading_error
                    display.show(tally)
                    exit_if_terminated()
        except (KeyboardInterrupt, SystemExit, OSError):
            if tally.num_done and path != STANDARD:
                print(
                    f"stu-generate: stopped; {path} has {tally.num_done:,} rows, and the same "
                    "command resumes from there",
                    file=sys.stderr,
                )
            raise
        if reading_error:
            raise UserError("input", message=f"{reading_error}; {path} has {tally.num_done:,} rows")
        # All rows are of the old content in any case: blocks are compared before they are used.
        engines.check_input()
        # Weights may be mapped from the disk. Where stu-export replaces the file, a process that
        # has it open keeps the old one.
        if fingerprint_of(weights) != loaded:
            reason = (
                f"model {config.model}: model.safetensors was overwritten during this run, and "
                "rows may be of either model; start anew with --overwrite"
            )
            output.condemn(reason)
            raise UserError("model", message=reason)
        require_same_job(identity, others)
    print(f"{tally}; wrote {path}", file=sys.stderr)
    return tally


def _engines(config: BatchConfig, task: ArrayTask) -> "Engines":
    if config.ray:
        with requires_extra("ray"):
            from serve.batch.cluster import ClusterEngines

        return ClusterEngines(config, task)
    from serve.batch.local import LocalEngines

    return LocalEngines(config, task)


def _check_output(config: BatchConfig, path: Path) -> None:
    if path == STANDARD:
        return
    if config.input.is_dir() and config.input.resolve() in path.resolve().parents:
        problem = f"is inside the input {config.input}; choose another folder"
    elif not path.parent.is_dir():
        problem = f"there is no folder {path.parent}; create it first"
    elif path.exists() and not path.is_file():
        problem = "is not a file; choose another, or - for standard output"
    elif path.exists() and config.input.exists() and path.samefile(config.input):
        problem = "is the input; choose another"
    else:
        return
    raise UserError("output", message=f"output {path}: {problem}")


@contextmanager
def _naming(task: ArrayTask) -> Iterator[None]:
    """Add the part and the host to errors of one of several array tasks."""
    try:
        yield
    except (UserError, OSError) as error:
        if task.count == 1:
            raise
        message = f"part {task} on {socket.gethostname()}: {error}"
        raise UserError("part", message=message) from error


def _parse(argv: Sequence[str] | None) -> BatchConfig:
    parser = ArgumentParser(
        prog="stu-generate",
        description="Decode a file of prompts. Each line of the input is a JSON object with a "
        '"prompt", and optionally an "id" and settings for this row (max_new_tokens, ..), or a '
        "request in OpenAI's batch format (completions, chats, responses, embeddings or "
        "scores of pairs of texts). The "
        "output has a line for each of them, in any order; with --score, the log probability of "
        'the prompt, or of the "completion" of the row. The same command resumes a run '
        "that was stopped or killed. The exit code is 1 if some rows could not be decoded; their "
        "lines say why.",
    )
    parser.add_argument(
        "model", metavar="MODEL_DIR", type=Path, help="Model directory, as stu-export writes it"
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_settings(BatchConfig)
    settings = parser.parse_args(argv).as_dict()
    del settings["config"]
    engine = {field.name: settings.pop(field.name) for field in fields(EngineConfig)}
    return BatchConfig(**settings, engine=EngineConfig(**engine))


if __name__ == "__main__":
    sys.exit(main())
