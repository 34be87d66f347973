"""Lists of sources for `stu-prepare`: YAML files with names, weights and paths."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stu.common.errors import UserError
from stu.common.text import nearest
from train.data.config import PrepareConfig
from train.data.mixture import NAME, NAME_ALLOWED
from train.data.reading.sources import KINDS

SUFFIXES = (".yaml", ".yml")
REQUIRED = ("name", "path")
OPTIONAL = ("weight", "kind", "text_key", "validation_fraction")


@dataclass(frozen=True)
class SourceConfig(PrepareConfig):
    """Settings of one source of a list: those of `stu-prepare`, or its own."""

    may_be_whole: ClassVar[bool] = True

    name: str = ""
    """Name of its folder, and in logs."""
    weight: float = 1.0
    """Share of the training tokens, to any scale."""


@contextmanager
def named(config: PrepareConfig) -> Iterator[None]:
    """Add the name of the source, if `config` is that of one, to a UserError in the block."""
    try:
        yield
    except UserError as error:
        if not isinstance(config, SourceConfig):
            raise
        raise UserError(error.field, message=f"source {config.name}: {error}") from error


def is_source_list(sources: Sequence[str]) -> bool:
    """Return whether `sources` are one list of sources. Raises UserError for one among others."""
    lists = [source for source in sources if source.lower().endswith(SUFFIXES)]
    if lists and len(sources) > 1:
        message = (
            f"source {lists[0]}: a list of sources must be the only SOURCE; add the others to it"
        )
        raise UserError("SOURCE", lists[0], message=message)
    return bool(lists)


def read_source_list(config: PrepareConfig) -> list[SourceConfig]:
    """Return the sources of the list that `config.sources` names, with `config` for what it leaves
    open. The output of a source is a folder in `config.output`.

    Raises UserError that names file, source and field.
    """
    path = Path(config.sources[0])
    rows = _read_yaml(path)
    if not isinstance(rows, list) or not rows:
        raise _refused(path, "expected a list of sources, each with `name` and `path`")
    sources: list[SourceConfig] = []
    for number, row in enumerate(rows, 1):
        name = row.get("name") if isinstance(row, dict) else None
        place = f"source {name}" if isinstance(name, str) and name else f"source {number}"
        try:
            source = _read_source(config, row)
        except UserError as error:
            raise _refused(path, f"{place}: {error}") from error
        # Their folders must differ on file systems that ignore case, too.
        if source.name.lower() in [other.name.lower() for other in sources]:
            raise _refused(path, f"{place}: another source has that name")
        sources.append(source)
    if not any(source.weight for source in sources):
        raise _refused(path, "the weight of every source is 0")
    return sources


def _read_source(config: PrepareConfig, row: Any) -> SourceConfig:
    if not isinstance(row, dict):
        raise UserError(message=f"expected `name` and `path`, not {row!r}")
    for field in row:
        if field not in (*REQUIRED, *OPTIONAL):
            known = [*REQUIRED, *OPTIONAL]
            raise UserError(str(field), message=f"no field {field!r}{nearest(str(field), known)}")
    for field in REQUIRED:
        if field not in row:
            raise UserError(field, message=f"no `{field}`")
    name, path, weight = row["name"], row["path"], row.get("weight", 1.0)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError("name", name, NAME_ALLOWED)
    paths = path if isinstance(path, list) else [path]
    if not paths or not all(isinstance(item, str) and item for item in paths):
        raise UserError("path", path, "a file, a folder, a glob or stdlib:, or a list of these")
    if not _is_number(weight) or weight < 0:
        raise UserError("weight", weight, "a number >= 0")
    fraction = row.get("validation_fraction", config.validation_fraction)
    if not _is_number(fraction):
        raise UserError("validation_fraction", fraction, "a number from 0 to 1")
    if fraction == 1 and weight > 0:
        raise UserError("validation_fraction", 1, "less than 1, unless the weight is 0")
    text_key = row.get("text_key", config.text_key)
    if not isinstance(text_key, str):
        raise UserError("text_key", text_key, "a string")
    kind = row.get("kind", config.kind)
    if kind not in (None, *KINDS.values()):
        raise UserError("kind", kind, f"one of {', '.join(dict.fromkeys(KINDS.values()))}")
    general = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own = {"sources": paths, "output": config.output / name, "text_key": text_key, "kind": kind}
    own |= {"validation_fraction": fraction, "name": name, "weight": weight}
    return SourceConfig(**{**general, **own})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_yaml(path: Path) -> Any:
    import yaml  # a tenth of a second, and most runs have no list

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, str(error)) from error
    except yaml.YAMLError as error:
        raise _refused(path, f"not YAML ({' '.join(str(error).split())})") from error


def _refused(path: Path, reason: str) -> UserError:
    return UserError("SOURCE", str(path), message=f"{path}: {reason}")
