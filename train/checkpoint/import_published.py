"""`stu-import`: from a published Flash-STU checkpoint to a model directory."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveFloat

from stu.common.cli import ArgumentParser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when done, 2 after an error, which leaves nothing behind."""
    parser = ArgumentParser(
        prog="stu-import",
        description="Write a model directory, which stu-generate reads, from a checkpoint of the "
        "published Flash-STU code whose MLPs gate with GELU: no checkpoint says whether they do, "
        "and with liger-kernel that code's first version gates with SiLU.",
    )
    add = parser.add_argument
    add(
        "published",
        metavar="PUBLISHED",
        type=Path,
        help="folder with config.json and model.safetensors, several with an index, or a torch "
        "file; or that file",
    )
    add("--output", metavar="MODEL_DIR", type=Path, required=True, help="folder to write")
    add(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        required=True,
        help="a SentencePiece model, or a folder with a tokenizer.model",
    )
    add(
        "--norm-eps",
        type=PositiveFloat,
        help="RMSNorm's epsilon; by default that of config.json, or else torch's default, 1.19e-7",
    )
    add("--overwrite", action="store_true", help="replace the output folder")
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
    tokenizer: Path,
    overwrite: bool = False,
    norm_eps: float | None = None,
) -> None:
    """Write the published checkpoint as the model directory `output`, weights in their own dtype.

    norm_eps: in place of what its config.json says.

    Raises ValueError or OSError, and then leaves nothing behind.
    """
    from stu.model_dir import save_model
    from stu.tokenizer import Tokenizer
    from train.checkpoint.published import load_published

    vocabulary = Tokenizer(tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer)
    model = load_published(published, norm_eps)
    if vocabulary.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"tokenizer {vocabulary.path}: has {vocabulary.vocab_size} tokens, and tok_emb.weight "
            f"of {published} {model.config.vocab_size} rows: give the tokenizer that the "
            "checkpoint was trained with, as a SentencePiece model"
        )
    save_model(output, model, vocabulary, overwrite=overwrite)


if __name__ == "__main__":
    sys.exit(main())
