"""`stu-export`: from a training checkpoint to a model directory, or to the published layout."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stu.common.cli import ArgumentParser, run_command

if TYPE_CHECKING:
    from stu.model import FlashSTU
    from stu.tokenizer import Tokenizer
    from train.checkpoint.folder import CheckpointFolder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when done, 2 after an error, which leaves nothing behind."""
    parser = ArgumentParser(
        prog="stu-export",
        description="Write a model directory, which stu-generate reads, from a checkpoint.",
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a step-*.ckpt, a run's folder: its last, or a model directory",
    )
    add("--output", metavar="DIR", type=Path, required=True, help="folder to write")
    add(
        "--format",
        type=Literal["stu", "published"],
        default="stu",
        help="a model directory, or the names and config.json of the published Flash-STU code",
    )
    add("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="of the weights")
    add("--overwrite", action="store_true", help="replace the output folder")
    given = parser.parse_args(argv)

    def write_model() -> int:
        export(given.checkpoint, given.output, given.dtype, given.overwrite, given.format)
        print(f"wrote {given.output}")
        return 0

    return run_command("stu-export", write_model, "train")


def export(
    checkpoint: Path,
    output: Path,
    dtype: str = "float32",
    overwrite: bool = False,
    layout: str = "stu",
) -> None:
    """Write the model of `checkpoint`, a file, a run's folder or a model directory, to `output`:
    as a model directory, or in the published layout.

    The checkpoint alone is read: it carries the model's shape and its tokenizer. Weights are
    mapped from the disk, and cast one at a time. Raises ValueError or OSError, and then leaves
    nothing behind.
    """
    import torch

    from stu.model_dir import save_model
    from train.checkpoint.published import save_published

    model, tokenizer, generation = _read(checkpoint)
    its_dtype = getattr(torch, dtype)
    if layout == "published":
        save_published(output, model, tokenizer, its_dtype, overwrite)
    else:
        save_model(output, model, tokenizer, generation, overwrite, its_dtype)


def _read(checkpoint: Path) -> "tuple[FlashSTU, Tokenizer, dict[str, Any]]":
    """The model, its tokenizer, and its defaults for decoding, if it has any."""
    import tempfile

    import torch

    from stu.config import ModelConfig
    from stu.model import FlashSTU
    from stu.model_dir import load_generation, load_model, load_tokenizer
    from stu.tokenizer import Tokenizer
    from train.checkpoint.callback import verified_checkpoint
    from train.checkpoint.folder import TRAINING_FILE, WEIGHT

    if (checkpoint / "model.safetensors").exists():
        model = load_model(checkpoint, dtype=None)
        return model, load_tokenizer(checkpoint), load_generation(checkpoint)
    is_run = checkpoint.is_dir() and not (checkpoint / TRAINING_FILE).exists()
    folder = _last_of_run(checkpoint) if is_run else verified_checkpoint(checkpoint)
    carried: Mapping[str, Any] = folder.training["stu"]
    with torch.device("meta"):
        model = FlashSTU(ModelConfig.from_dict(carried["model_config"]))
    weights = {name: folder.tensor(WEIGHT, name) for name in folder.names}
    model.load_state_dict(weights, assign=True)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer_file = Path(temporary) / "tokenizer.model"
        tokenizer_file.write_bytes(carried["tokenizer"].numpy().tobytes())
        tokenizer = Tokenizer(tokenizer_file)
    return model, tokenizer, {}


def _last_of_run(run_dir: Path) -> "CheckpointFolder":
    """The last checkpoint of a run, which may go on meanwhile and delete it for a newer one."""
    from train.checkpoint.callback import last_checkpoint, verified_checkpoint

    while True:
        path = last_checkpoint(run_dir).resolve()
        try:
            return verified_checkpoint(path)
        except ValueError:
            if path.exists() or last_checkpoint(run_dir).resolve() == path:
                raise


if __name__ == "__main__":
    sys.exit(main())
