"""`stu-eval`: evaluate a model directory."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from serve.config import EngineConfig
from serve.evaluation.config import EvaluationConfig
from stu.common.cli import ArgumentParser, run_command
from stu.common.errors import UserError

BOOTSTRAP = 1000
"""Samples for the standard errors of metrics that are no means."""


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `stu-eval`."""

    evaluation: EvaluationConfig
    """Tasks to run."""
    output: Path | None = None
    """JSON file to write, with plots of needle and recall beside it. null: the results are printed
    as JSON, without plots"""
    device: str = "auto"
    """Device to compute on. auto: the first CUDA device, or cpu if there is none. Or cpu, 0, cuda:1
    and the like"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights"""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Settings of the engine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""

    def evaluate_model() -> int:
        path, config = _parse(argv)
        evaluate(path, config)
        return 0

    return run_command("stu-eval", evaluate_model, "eval", EvalConfig)


def evaluate(path: Path, config: EvalConfig) -> None:
    """Evaluate the model directory `path`, and write or print the results.

    Raises UserError or OSError, before anything is computed for settings that cannot be used.
    """
    if config.output is not None and not config.output.parent.is_dir():
        message = f"output {config.output}: there is no folder {config.output.parent}"
        raise UserError("output", message=f"{message}; create it first")
    if config.output is not None and config.output.is_dir():
        raise UserError("output", config.output, "a file, and there is a folder with this name")
    import torch

    import stu
    from serve.devices import choose_devices, memory_checked
    from serve.evaluation.evaluation import Evaluation
    from serve.evaluation.results import report, table, write_report
    from serve.evaluation.text_model import EngineModel
    from stu.common.machine import limit_threads
    from stu.model_dir import load_config, load_model, load_tokenizer

    devices = choose_devices(config.device, "device")
    if len(devices) > 1:
        raise UserError("device", config.device, "one device")
    tokenizer, longest = load_tokenizer(path), load_config(path).max_seq_len
    evaluation = Evaluation(config.evaluation, tokenizer, longest, BOOTSTRAP)
    limit_threads()
    where = devices[0], getattr(torch, config.dtype), config.engine.weights
    with memory_checked():
        # Nothing else keeps the model, whose weights the engine may replace.
        model = EngineModel(load_model(path, *where), tokenizer, config.engine, use_tqdm=True)
        results = evaluation.run(model)
    about: dict[str, Any] = {"model": str(path), "stu_version": stu.__version__}
    about["settings"] = {**config.evaluation.to_json(), "dtype": config.dtype}
    about["settings"]["engine"] = asdict(config.engine)
    print(table(results), file=sys.stderr)
    if config.output is None:
        print(json.dumps(report(results, **about), indent=1, ensure_ascii=False))
        return
    for written in write_report(config.output, results, **about):
        print(f"wrote {written}", file=sys.stderr)


def _parse(argv: Sequence[str] | None) -> tuple[Path, EvalConfig]:
    parser = ArgumentParser(
        prog="stu-eval",
        description="Evaluate a model on lm-eval's tasks, and on needle and recall, which ask for "
        "facts in long texts. The results are JSON, with plots of needle and recall beside it.",
    )
    parser.add_argument(
        "model", metavar="MODEL_DIR", type=Path, help="Model directory, as stu-export writes it"
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_settings(EvalConfig)
    settings: dict[str, Any] = parser.parse_args(argv).as_dict()
    del settings["config"]
    engine, evaluation = (
        {part.name: settings.pop(part.name) for part in fields(kind)}
        for kind in (EngineConfig, EvaluationConfig)
    )
    path = settings.pop("model")
    parts = EvaluationConfig(**evaluation), EngineConfig(**engine)
    return path, EvalConfig(**settings, evaluation=parts[0], engine=parts[1])


if __name__ == "__main__":
    sys.exit(main())
