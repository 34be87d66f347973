"""Settings of `stu-generate`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from serve.config import EngineConfig, is_whole
from serve.sampling_params import SamplingParams
from stu.common.array_task import ArrayTask
from stu.common.errors import UserError, setting_name

Dtype = Literal["float32", "bfloat16"]
FormatName = Literal["auto", "prompts", "openai"]
OPENAI_HAS_NO_SCORES = (
    'rows of OpenAI\'s format cannot be scored: give rows of {"prompt": ..} to --score'
)


@dataclass(frozen=True)
class BatchConfig:
    """Settings of a batch run. Settings that are None default to those of the model directory, or
    for rows in OpenAI's format to OpenAI's."""

    model: Path
    """Model directory, as stu-export writes it."""
    input: Path
    """JSON lines of prompts or of OpenAI's batch format, plain or compressed with gzip or
    Zstandard; Parquet; a folder of such files; a pipe; or - for standard input."""
    output: Path
    """JSON lines to write, or - for standard output, from which a stopped run cannot resume. A file
    beside it, .job.json, records the input, model and settings."""
    format: FormatName = "auto"
    """Format of the rows. auto: openai if the first row has a custom_id or a body, otherwise
    prompts."""
    column: str | None = None
    """Parquet column of the prompts, or struct.field for a field of a struct. None: prompt."""
    id_column: str | None = None
    """Parquet column of the ids. None: the id of a row is its number."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens per row. None: the model directory's default."""
    temperature: float | None = None
    """Sampling temperature; 0 always chooses the most probable token. None: the model
    directory's."""
    top_k: int | None = None
    """Number of most probable tokens to sample from; 0: all. None: the model directory's."""
    top_p: float | None = None
    """Cumulative probability of the most probable tokens to sample from; 1: all. None: the model
    directory's."""
    min_p: float | None = None
    """Minimum probability of a token, relative to that of the most probable token. None: the model
    directory's."""
    seed: int | None = None
    """Seed of the random choices. None: 0."""
    stop_at_eos: bool | None = None
    """End a completion at the end-of-text token. None: true."""
    dtype: Dtype = "float32"
    """Data type of the weights."""
    devices: str = "auto"
    """Devices to decode on. auto: the first CUDA device, or cpu if there is none. all: every CUDA
    device. Or a list such as cpu, 0, cuda:1, 0,1,2,3 or cpu,cpu, with a process for each."""
    tensor_parallel: int = 1
    """Number of devices to divide the model among, if it is too large for one: each has a part of
    the weights and of the caches. It must divide the model's width and number of attention heads.
    Consecutive devices of the list form a group; cpu stands for all of them."""
    part: str | None = None
    """Part of the rows to decode, as i/n with i from 0: rows whose number modulo n is i, written to
    OUTPUT with .i-of-n before its suffix. In a job array, give $SLURM_ARRAY_TASK_ID/N, where N is
    the size of the whole array even if only some tasks are run again. None: all rows, or this
    task's share if srun started several."""
    ray: bool = False
    """Decode on the hosts of the Ray cluster at RAY_ADDRESS, or of this host's. The model directory
    and the input must have the same paths on every host; the input may also be a URL, such as
    s3://bucket/folder."""
    engines: int | None = None
    """Maximum number of engines on a Ray cluster. None: one per GPU, or one per host without
    GPUs."""
    cpus_per_engine: int | None = None
    """Number of CPUs reserved for each engine on a Ray cluster, and threads of an engine without a
    GPU. None: 1."""
    score: bool = False
    """Score the rows instead of generating text: write the log probability of each prompt, or of a
    row's completion given its prompt."""
    overwrite: bool = False
    """Replace an existing output instead of resuming it. A Slurm job that has been requeued resumes
    what it has written."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Settings of the engine."""

    def __post_init__(self) -> None:
        if self.part is not None:
            ArrayTask.parse(self.part)
        if self.score:
            self._check_score()
        for name in ("engines", "cpus_per_engine"):
            count = getattr(self, name)
            if count is not None and (not is_whole(count) or count < 1):
                raise UserError(name, count, "a whole number >= 1")
            if count is not None and not self.ray:
                fix = f"it is for {setting_name('ray')} alone; leave it out"
                raise UserError(name, count, fix=fix)
        if self.ray and self.devices != "auto":
            fix = "with --ray, Ray gives each engine a GPU; leave it out"
            raise UserError("devices", self.devices, fix=fix)
        if self.ray and self.tensor_parallel > 1:
            raise UserError("tensor_parallel", self.tensor_parallel, "1 with --ray")

    def _check_score(self) -> None:
        names = {own.name for own in fields(self)} & {own.name for own in fields(SamplingParams)}
        values = {name: getattr(self, name) for name in sorted(names)}
        values |= {n: getattr(self.engine, n) for n in ("expected_new_tokens", "speculate")}
        for name, value in values.items():
            if value is not None:
                message = f"{setting_name(name)} is not allowed with {setting_name('score')}"
                raise UserError(name, message=f"{message}, which generates nothing; leave it out")
        if self.format == "openai":
            raise UserError("format", message=OPENAI_HAS_NO_SCORES)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        paths = {name: str(getattr(self, name)) for name in ("model", "input", "output")}
        return {**asdict(self), **paths}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BatchConfig":
        """Return the settings that `to_json` wrote."""
        paths = {name: Path(values[name]) for name in ("model", "input", "output")}
        return cls(**{**values, **paths, "engine": EngineConfig(**values["engine"])})
