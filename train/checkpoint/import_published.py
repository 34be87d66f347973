"""`stu-import`: write a checkpoint of another layout as a model directory."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveFloat

from stu.common.cli import ArgumentParser, run_command
from stu.common.errors import UserError
from stu.common.files import require_apart

if TYPE_CHECKING:
    from stu.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code. An error leaves nothing behind."""
    parser = ArgumentParser(
        prog="stu-import",
        description="Convert a checkpoint of the published Flash-STU code or of HyenaDNA, or a "
        "folder that stu-export wrote for transformers, to a model directory for stu-generate and "
        "stu-serve. MLPs of a Flash-STU checkpoint must use GELU, which cannot be checked: with "
        "liger-kernel installed, the first version of that code uses SiLU instead.",
    )
    add = parser.add_argument
    add(
        "published",
        metavar="PUBLISHED",
        type=Path,
        help="Folder with config.json and the weights: model.safetensors, several such files with "
        "an index, or a PyTorch file; or the file itself",
    )
    add("--output", metavar="MODEL_DIR", type=Path, required=True, help="Folder to write")
    tokenizer = (
        "Tokenizer of the checkpoint: a tokenizer.model, tokenizer.json, alphabet.json or "
        "o200k_base.tiktoken, or a folder with one; not needed for HyenaDNA and for folders for "
        "transformers"
    )
    add("--tokenizer", metavar="PATH", type=Path, help=tokenizer)
    add(
        "--norm-eps",
        type=PositiveFloat,
        help="Epsilon of RMSNorm in a published checkpoint; by default that of config.json, or "
        "PyTorch's default, 1.19e-7",
    )
    add("--overwrite", action="store_true", help="Replace the output folder")
    given = parser.parse_args(argv)

    def write_model() -> int:
        import_published(
            given.published, given.output, given.tokenizer, given.overwrite, given.norm_eps
        )
        print(f"wrote {given.output}")
        return 0

    return run_command("stu-import", write_model, "train")


def import_published(
    published: Path,
    output: Path,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    norm_eps: float | None = None,
) -> None:
    """Write a checkpoint as the model directory `output`, weights in their own dtype.

    Args:
        published: Folder or file of weights.
        output: Folder to write.
        tokenizer: File of a tokenizer, or its folder; None: that of a folder for transformers, or
            of HyenaDNA.
        overwrite: Whether an existing `output` is replaced.
        norm_eps: Epsilon of RMSNorm of a published checkpoint, instead of that in config.json.

    Raises UserError or OSError, and then leaves nothing behind.
    """
    from stu.chat.template import FILE_NAME, find_template
    from stu.model_dir import save_model
    from stu.tokenizer import read_tokenizer
    from train.checkpoint import hyenadna, transformers_folder
    from train.checkpoint.generation_config import load_generation
    from train.checkpoint.published import load_published

    require_apart(published, output)
    generation: dict[str, Any] = {}
    others: dict[str, bytes] = {}
    own_tokenizer: Callable[[int], Tokenizer] | None = None
    folder = published if published.is_dir() else published.parent
    if (config := transformers_folder.read_config(published)) is not None:
        model = transformers_folder.load_transformers(published, config)
        own_tokenizer = partial(transformers_folder.load_tokenizer, folder)
        generation = load_generation(folder)
        others = transformers_folder.other_files(folder)
    elif (config := hyenadna.read_config(published)) is not None:
        model = hyenadna.load_hyenadna(published, config)
        own_tokenizer = hyenadna.hyenadna_tokenizer
    else:
        model = load_published(published, norm_eps)
        if (template := find_template(folder)[1]) is not None:
            others = {FILE_NAME: template.encode()}
    if config is not None and norm_eps is not None:
        raise UserError("norm_eps", norm_eps, fix="leave it out: config.json has it")
    if tokenizer is not None:
        vocabulary = read_tokenizer(tokenizer, model.config.vocab_size)
    elif own_tokenizer is not None:
        vocabulary = own_tokenizer(model.config.vocab_size)
    else:
        fix = "give the tokenizer that the checkpoint was trained with"
        raise UserError("tokenizer", message=f"--tokenizer is missing: {fix}")
    save_model(output, model, vocabulary, generation, overwrite, others=others)


if __name__ == "__main__":
    sys.exit(main())
