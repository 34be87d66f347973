"""`stu-export`: from a training checkpoint to a model directory."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stu.arguments import ArgumentParser, run_command


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
        help="a step-*.ckpt, or a run's folder: its last",
    )
    add("--output", metavar="MODEL_DIR", type=Path, required=True, help="folder to write")
    add("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="of the weights")
    add("--overwrite", action="store_true", help="replace the output folder")
    given = parser.parse_args(argv)

    def write_model() -> int:
        export(given.checkpoint, given.output, given.dtype, given.overwrite)
        print(f"wrote {given.output}")
        return 0

    return run_command("stu-export", write_model)


def export(checkpoint: Path, output: Path, dtype: str = "float32", overwrite: bool = False) -> None:
    """Write the model of `checkpoint`, a file or a run's folder, as the model directory `output`.

    The checkpoint alone is read: it carries the model's shape and its tokenizer. Raises ValueError
    or OSError, and then leaves nothing behind.
    """
    import tempfile

    import torch

    from stu.checkpoint import save_model
    from stu.config import ModelConfig
    from stu.model import FlashSTU
    from stu.tokenizer import Tokenizer
    from train.checkpoint_folder import TRAINING_FILE, WEIGHT, CheckpointFolder
    from train.checkpoints import last_checkpoint

    is_run = checkpoint.is_dir() and not (checkpoint / TRAINING_FILE).exists()
    folder = CheckpointFolder(last_checkpoint(checkpoint) if is_run else checkpoint)
    carried: Mapping[str, Any] = folder.training["stu"]
    with torch.device("meta"):
        model = FlashSTU(ModelConfig.from_dict(carried["model_config"]))
    # Mapped from the disk, and not in memory until they are written.
    weights = {name: folder.tensor(WEIGHT, name) for name in folder.names}
    model.load_state_dict(weights, assign=True)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer_file = Path(temporary) / "tokenizer.model"
        tokenizer_file.write_bytes(carried["tokenizer"].numpy().tobytes())
        tokenizer = Tokenizer(tokenizer_file)
    save_model(output, model.to(getattr(torch, dtype)), tokenizer, overwrite=overwrite)


if __name__ == "__main__":
    sys.exit(main())
