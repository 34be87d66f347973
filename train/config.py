"""Checks of a run's settings, which `stu-plan` and `stu-train` share."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from stu.common.cli import option
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.tokenizer import MOST_UNUSED
from train.callbacks.bad_steps import GuardConfig
from train.data.loader import TokenData
from train.data.mixture import first_index
from train.loggers import check_loggers
from train.optimizer import OptimizerConfig, check_schedule, optimizer_kind
from train.parallel.config import ParallelConfig
from train.start.launch import detect_launch
from train.tasks.config import RunEvaluation
from train.tuning.start import check_start

COUNTS = (
    *("max_steps", "accumulate_grad_batches", "val_check_interval", "log_every_n_steps"),
    "num_nodes",
)
"""Trainer settings that must be whole numbers >= 1."""
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PROFILERS = ("simple", "advanced", "pytorch")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
PRECISION_ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}
LARGEST_SEED = 2**32 - 1
"""Largest seed that NumPy takes."""


def check_settings(
    settings: Any, is_plan: bool
) -> tuple[ModelConfig, OptimizerConfig, ParallelConfig, RunEvaluation]:
    """Check every parsed setting of a run, and return the groups that are objects. A vocabulary of
    0 becomes that of the token shards.

    is_plan: whether the run may be for another machine, where the data is; the vocabulary must then
    be given. Raises UserError.
    """
    for name in COUNTS:
        _require_count(f"trainer.{name}", settings.trainer[name])
    for name in ("seq_len", "micro_batch_size", "max_validation_tokens"):
        _require_count(f"data.{name}", settings.data[name])
    for name in ("checkpoint_every_steps", "keep_checkpoints"):
        _require_count(option(name), settings[name])
    for name in ("checkpoint_every_minutes", "hang_minutes"):
        _require(option(name), settings[name], settings[name] > 0, "above 0")
    z_loss = settings.model.z_loss
    _require("model.z_loss", z_loss, 0 <= z_loss < math.inf, "a number >= 0")
    seed = settings.seed_everything
    is_seed = 0 <= seed <= LARGEST_SEED
    _require(option("seed_everything"), seed, is_seed, f"from 0 to {LARGEST_SEED}")
    optimizer = OptimizerConfig(**_values(settings.model.optimizer))
    optimizer_kind(optimizer)
    check_schedule(optimizer, settings.trainer.max_steps)
    GuardConfig(**_values(settings.model.guard))
    check_loggers(settings.logger)
    left_out = {"include_path": None} if is_plan else {}  # it may be on another machine
    evaluation = RunEvaluation(**{**_values(settings.evaluation), **left_out})
    parallel = ParallelConfig(**_values(settings.parallel))
    _check_trainer(settings.trainer)
    _check_devices(settings.trainer, is_plan)
    _check_precision(settings.trainer, parallel)
    config = _check_model_and_data(settings, is_plan)
    _check_context(parallel.context, config, settings.data)
    check_start(settings, config)
    return config, optimizer, parallel, evaluation


def open_data(settings: Any) -> TokenData | None:
    """Return the data of a run; None if it is not on this machine."""
    return TokenData(**_values(settings.data)) if Path(settings.data.dir).exists() else None


def check_validation_share(limit: Any, data: TokenData, world_size: int) -> None:
    """Raise UserError if a share of the validation batches is less than one of them.

    Args:
        limit: `trainer.limit_val_batches`.
        data: Data of the run.
        world_size: Ranks that read different samples.
    """
    fewest = min(map(len, data.validation_sets(0, world_size)))
    if isinstance(limit, float) and limit > 0 and int(limit * fewest) < 1:
        allowed = f"0, a whole number, or a share of at least 1 of the {fewest} batches that a "
        allowed += "validation has, of each source"
        raise UserError("trainer.limit_val_batches", limit, allowed)


def precision_name(precision: object) -> str:
    """Return the canonical name of a precision."""
    return PRECISION_ALIASES.get(str(precision), str(precision))


def check_vocabulary(model_size: int, data_size: int) -> None:
    """Raise UserError unless a model's vocabulary is that of its token shards, perhaps padded."""
    if not 0 <= model_size - data_size <= MOST_UNUSED:
        raise UserError(
            "model.config.vocab_size",
            model_size,
            message=f"model.config.vocab_size={model_size}, but the token shards were made with "
            f"{data_size} tokens: give --model.config.vocab_size {data_size}, or up to "
            f"{MOST_UNUSED} more",
        )


def check_length(seq_len: int, max_seq_len: int) -> None:
    """Raise UserError if samples are longer than the model's context."""
    if seq_len > max_seq_len:
        raise UserError(
            "data.seq_len",
            seq_len,
            message=f"data.seq_len={seq_len} exceeds model.config.max_seq_len={max_seq_len}: lower "
            "the one or raise the other",
        )


def num_devices(trainer: Any) -> int | None:
    """Return the number of devices per node that the settings ask for; None for all there are."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, list):
        return len(devices)
    return None if str(devices) in ("auto", "-1") else int(devices)


def _check_trainer(trainer: Any) -> None:
    clip = trainer.gradient_clip_val
    is_clip = clip is None or 0 <= clip < math.inf
    _require("trainer.gradient_clip_val", clip, is_clip, "a number >= 0, or null")
    algorithm = trainer.gradient_clip_algorithm
    is_known = algorithm in (None, "norm", "value")
    _require("trainer.gradient_clip_algorithm", algorithm, is_known, "norm or value")
    profiler = trainer.profiler
    is_known = not isinstance(profiler, str) or profiler in PROFILERS
    _require("trainer.profiler", profiler, is_known, ", ".join(PROFILERS))
    sanity = trainer.num_sanity_val_steps
    is_steps = sanity is None or sanity >= -1
    _require("trainer.num_sanity_val_steps", sanity, is_steps, "a whole number >= 0, or -1 for all")
    limit = trainer.limit_val_batches
    is_share = isinstance(limit, float) and 0 <= limit <= 1
    is_count = isinstance(limit, int) and limit >= 0
    allowed = "a whole number >= 0, or a share from 0.0 to 1.0"
    _require("trainer.limit_val_batches", limit, limit is None or is_share or is_count, allowed)
    if trainer.max_time is not None:
        try:
            seconds = Timer(trainer.max_time).time_remaining()
        except (MisconfigurationException, TypeError, OverflowError) as error:
            raise UserError(
                "trainer.max_time",
                trainer.max_time,
                message=f"trainer.max_time={trainer.max_time!r}: {error}",
            ) from error
        is_time = seconds is not None and seconds > 0
        _require("trainer.max_time", trainer.max_time, is_time, "longer than 0 s, as DD:HH:MM:SS")


def chosen_accelerator(trainer: Any) -> dict[str, str]:
    """Return what replaces the setting `trainer.accelerator`, if anything: `auto` is CUDA or the
    CPU. Lightning would take a Mac's GPU, which has no float64."""
    is_cpu = trainer.accelerator == "auto" and not torch.cuda.is_available()
    return {"accelerator": "cpu"} if is_cpu else {}


def _check_devices(trainer: Any, is_plan: bool) -> None:
    accelerator, devices = trainer.accelerator, trainer.devices
    if isinstance(accelerator, str):
        is_known = accelerator in ACCELERATORS
        _require("trainer.accelerator", accelerator, is_known, ", ".join(ACCELERATORS))
    is_cpu = accelerator == "cpu"
    if accelerator == "auto" and not is_plan:
        is_cpu = not torch.cuda.is_available()
    if not is_cpu and not is_plan:
        detect_launch().check_gpus(torch.cuda.device_count())
    text = str(devices).strip("[] ")
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if isinstance(devices, list) or "," in text:
        holds = bool(numbers) and min(numbers) >= 0 and len(set(numbers)) == len(numbers)
        holds = holds and not is_cpu
    else:
        all_of_them = text == "auto" or (text == "-1" and not is_cpu)
        holds = all_of_them or (len(numbers) == 1 and numbers[0] >= 1)
    allowed = "a whole number >= 1 or auto" + ("" if is_cpu else ", or the devices' own numbers")
    _require("trainer.devices", devices, holds, allowed)


def _check_precision(trainer: Any, parallel: ParallelConfig) -> None:
    precision = precision_name(trainer.precision)
    if precision in ("16", "16-mixed", "16-true"):
        raise UserError(
            "trainer.precision",
            trainer.precision,
            fix="float16 rounds the gradients of a large vocabulary to zero; take bf16-mixed or "
            "32-true",
        )
    _require("trainer.precision", trainer.precision, precision in PRECISIONS, ", ".join(PRECISIONS))
    if parallel.kind == "fsdp" and precision == "bf16-true":
        raise UserError(
            "trainer.precision", precision, "32-true or bf16-mixed with parallel.kind=fsdp"
        )
    if parallel.kind == "zero" and parallel.zero_stage == 0 and precision != "32-true":
        raise UserError(
            "parallel.zero_stage",
            0,
            message="parallel.zero_stage=0 trains in float32 alone, but trainer.precision is "
            f"{trainer.precision}: take stage 1, 2 or 3, or parallel.kind=ddp",
        )
    if parallel.kind == "zero" and trainer.gradient_clip_algorithm == "value":
        raise UserError(
            "trainer.gradient_clip_algorithm", "value", "norm", "DeepSpeed clips by norm alone"
        )


def _check_model_and_data(settings: Any, is_plan: bool) -> ModelConfig:
    shape, data = settings.model.config, settings.data
    has_data = not is_plan or Path(data.dir).exists() or not shape.vocab_size
    if has_data:
        index = first_index(data.dir)
        shape.vocab_size = shape.vocab_size or index.vocab_size
        check_vocabulary(shape.vocab_size, index.vocab_size)
    try:
        config = ModelConfig(**_values(shape))
    except UserError as error:
        raise error.renamed(f"model.config.{error.field}") from error
    check_length(data.seq_len, config.max_seq_len)
    if has_data:
        TokenData(**_values(data))  # raises if it is incomplete or too short for one sample
    return config


def _check_context(context: int, config: ModelConfig, data: Any) -> None:
    if data.documents == "apart":
        _require("parallel.context", context, context == 1, "1 with data.documents=apart")
    # Slices may be exchanged for channels.
    allowed = f"at most model.config.width={config.width}"
    _require("parallel.context", context, context <= config.width, allowed)
    allowed = f"a divisor of data.seq_len={data.seq_len}"
    _require("parallel.context", context, data.seq_len % context == 0, allowed)


def _values(group: Any) -> dict[str, Any]:
    """Return the settings of a group, without the name of the file that they were read from."""
    return {name: value for name, value in group.as_dict().items() if name != "__path__"}


def _require_count(name: str, value: Any) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _require(name, value, is_count, "a whole number >= 1")


def _require(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(name, value, allowed)
