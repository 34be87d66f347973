"""The settings of `stu-generate`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from serve.config import EngineConfig
from stu.common.array_task import ArrayTask

Dtype = Literal["float32", "bfloat16"]
FormatName = Literal["auto", "prompts", "openai"]


@dataclass(frozen=True)
class BatchConfig:
    """What `stu-generate` reads and writes, and with what."""

    model: Path
    """Model directory."""
    input: Path
    """JSON lines of prompts or of OpenAI's batch format, plain or compressed with gzip or
    Zstandard; Parquet; a folder of such files; a pipe, or - for standard input."""
    output: Path
    """JSON lines to write, or - for standard output, where a run cannot go on after a stop. What
    decides its rows goes into a file beside it, .job.json."""
    format: FormatName = "auto"
    """Of the rows. auto: openai if the first one has a custom_id or a body."""
    column: str | None = None
    """Column of a Parquet file with the prompts; struct.field within a struct. None: prompt."""
    id_column: str | None = None
    """Of a Parquet file, with the ids. None: a row's id is its number."""
    max_new_tokens: int | None = None
    """Tokens after which a completion ends. None: the model directory's (for rows of OpenAI's
    format: OpenAI's); likewise below."""
    temperature: float | None = None
    """0: the most probable token always."""
    top_k: int | None = None
    """Choose among so many tokens; 0: all."""
    top_p: float | None = None
    """Choose among tokens of this share of probability; 1: all."""
    min_p: float | None = None
    """Leave out tokens less probable than this share of the most probable one's."""
    seed: int | None = None
    """Of the random choices. None: 0."""
    stop_at_eos: bool | None = None
    """End a completion at the token that ends a document. None: true."""
    dtype: Dtype = "float32"
    """Of the weights."""
    devices: str = "auto"
    """auto: the first CUDA device, or cpu without any. all: every CUDA device. Or a list: cpu, 0,
    cuda:1, 0,1,2,3, or cpu,cpu, each with a process of its own."""
    part: str | None = None
    """i/n, from 0: decode the rows whose numbers leave i when divided by n, into OUTPUT with
    .i-of-n before its suffix. In a job array: $SLURM_ARRAY_TASK_ID/N, with the N of the whole
    array, for one that is run again in part does not know it. None: all rows, or among several
    tasks of one srun step each its own."""
    overwrite: bool = False
    """Begin anew if there is an output already, in place of going on with it. Not for a job that
    may be requeued."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How rows are decoded together."""

    def __post_init__(self) -> None:
        if self.part is not None:
            ArrayTask.parse(self.part)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        paths = {name: str(getattr(self, name)) for name in ("model", "input", "output")}
        return {**asdict(self), **paths}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BatchConfig":
        """From what `to_json` gave."""
        paths = {name: Path(values[name]) for name in ("model", "input", "output")}
        return cls(**{**values, **paths, "engine": EngineConfig(**values["engine"])})
