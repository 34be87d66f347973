"""`stu-export`: write a training checkpoint as a model directory, or for other programs."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stu.common.cli import ArgumentParser, run_command
from stu.common.errors import UserError
from stu.common.files import require_apart

if TYPE_CHECKING:
    from stu.config import Weights
    from stu.model import FlashSTU
    from stu.tokenizer import Tokenizer
    from train.checkpoint.folder import CheckpointFolder

FACTS = {
    "tokens of the corpus": "data.num_tokens",
    "optimizer": "model.optimizer.name",
    "learning rate": "model.optimizer.learning_rate",
    "precision": "trainer.precision",
}
"""Settings of a run that its model card lists."""
RESULTS = {
    "loss, nats per token": "val/loss",
    "bits per byte": "val/bits_per_byte",
    "next token is the likeliest": "val/accuracy",
}
"""Results of a validation that a model card lists."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code. An error leaves nothing behind."""
    parser = ArgumentParser(
        prog="stu-export",
        description="Write the model of a training checkpoint as a model directory for "
        "stu-generate and stu-serve, or in another format.",
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="Checkpoint (step-*.ckpt), run folder (for its last checkpoint), or model directory",
    )
    add("--output", metavar="DIR", type=Path, required=True, help="Folder to write")
    add(
        "--format",
        type=Literal["stu", "published", "transformers", "adapter"],
        default="stu",
        help="stu: a model directory; published: tensor names and config.json of the published "
        "Flash-STU code; transformers: a folder that Hugging Face's transformers loads with "
        "trust_remote_code=True, with the code, the tokenizer and a model card; adapter: only the "
        "LoRA adapters of a run, for the peft library and a base model in the format transformers",
    )
    add(
        "--dtype",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="Dtype of the weights",
    )
    add(
        "--weights",
        type=Literal["float", "int8"],
        help="int8: 8-bit matrices, a quarter of the size of float32, which decode faster on a "
        "CPU; by default, the format of the input",
    )
    add("--overwrite", action="store_true", help="Replace the output folder")
    given = parser.parse_args(argv)

    def write_model() -> int:
        export(
            given.checkpoint,
            given.output,
            given.dtype,
            given.overwrite,
            given.format,
            given.weights,
        )
        print(f"wrote {given.output}")
        return 0

    return run_command("stu-export", write_model, "train")


def export(
    checkpoint: Path,
    output: Path,
    dtype: str = "float32",
    overwrite: bool = False,
    layout: str = "stu",
    weights: "Weights | None" = None,
) -> None:
    """Write the model of `checkpoint` to the folder `output`.

    Nothing but the checkpoint is read, as it carries the model's shape and its tokenizer. Weights
    are mapped from the disk and cast one at a time.

    Args:
        checkpoint: Checkpoint, folder of a run, or model directory.
        output: Folder to write.
        dtype: Dtype of the weights.
        overwrite: Whether an existing `output` is replaced.
        layout: `stu` for a model directory, `published`, `transformers`, or `adapter`.
        weights: Format of the matrices of a model directory; None: as they are.

    Raises UserError or OSError, and then leaves nothing behind.
    """
    import torch

    from stu.chat.template import FILE_NAME as CHAT_TEMPLATE
    from stu.chat.template import find_template
    from stu.model_dir import save_model
    from train.checkpoint.adapter_folder import save_adapters
    from train.checkpoint.published import save_published
    from train.checkpoint.transformers_folder import save_transformers

    if weights == "int8" and layout != "stu":
        raise UserError("weights", weights, f"float for the {layout} layout")
    torch_dtype, folder = getattr(torch, dtype), _training_checkpoint(checkpoint)
    require_apart(checkpoint if folder is None else folder.path, output)
    if layout == "adapter":
        save_adapters(output, folder, torch_dtype, overwrite)
        return
    model, tokenizer, generation = _read(checkpoint, folder)
    chat: dict[str, bytes] = {}
    if folder is None:
        if (template := find_template(checkpoint)[1]) is not None:
            chat[CHAT_TEMPLATE] = template.encode()
    elif "chat_template" in (carried := folder.training["stu"]):
        chat[CHAT_TEMPLATE] = carried["chat_template"].numpy().tobytes()
    if layout == "published":
        save_published(output, model, tokenizer, torch_dtype, overwrite)
    elif layout == "transformers":
        facts = ({}, {}) if folder is None else (_training_facts(folder), _validation_facts(folder))
        arguments = torch_dtype, overwrite, generation, chat, *facts
        save_transformers(output, model, tokenizer, *arguments)
    else:
        kept: Weights = "int8" if model.weights == "int8" else "float"
        stored = overwrite, torch_dtype, weights or kept, chat
        save_model(output, model, tokenizer, generation, *stored)


def _training_checkpoint(checkpoint: Path) -> "CheckpointFolder | None":
    """Return the training checkpoint, the last of a run; None: it is a model directory."""
    from train.checkpoint.folder import TRAINING_FILE
    from train.checkpoint.resume import verified_checkpoint

    if (checkpoint / "model.safetensors").exists():
        return None
    is_run = checkpoint.is_dir() and not (checkpoint / TRAINING_FILE).exists()
    return _last_of_run(checkpoint) if is_run else verified_checkpoint(checkpoint)


def _read(
    checkpoint: Path, folder: "CheckpointFolder | None"
) -> "tuple[FlashSTU, Tokenizer, dict[str, Any]]":
    """Return the model, its tokenizer, and its defaults for decoding, if it has any."""
    import torch

    from stu.config import ModelConfig
    from stu.model import FlashSTU
    from stu.model_dir import load_generation, load_model, load_tokenizer
    from stu.tokenizer import make_tokenizer
    from train.checkpoint.folder import WEIGHT
    from train.lora import LoraConfig, merged

    if folder is None:
        model = load_model(checkpoint, dtype=None)
        return model, load_tokenizer(checkpoint), load_generation(checkpoint)
    carried: Mapping[str, Any] = folder.training["stu"]
    with torch.device("meta"):
        model = FlashSTU(ModelConfig.from_dict(carried["model_config"]))
    weights = {name: folder.tensor(WEIGHT, name) for name in folder.names}
    if adapters := carried.get("lora"):
        weights = merged(weights, LoraConfig(**adapters))
    model.load_state_dict(weights, assign=True)
    stored = carried["tokenizer"]
    if isinstance(stored, torch.Tensor):  # written when SentencePiece was the only kind
        stored = {"tokenizer.model": stored}
    files = {name: contents.numpy().tobytes() for name, contents in stored.items()}
    tokenizer = make_tokenizer(files, checkpoint, model.config.vocab_size)
    return model, tokenizer, {}


def _training_facts(folder: "CheckpointFolder") -> dict[str, str]:
    """Return what a checkpoint says of its training, by name, for a model card."""
    training = folder.training  # its `optimizer_step` leaves out skipped updates
    settings = training["stu"].get("settings", {})
    facts = {"optimizer steps": f"{training['global_step']:,}"}
    per_step = [settings.get(name) for name in ("samples_per_step", "data.seq_len")]
    if None not in per_step:
        facts["tokens read"] = f"{training['TokenData']['position'] * per_step[1]:,}"
        facts["tokens of a step"] = f"{per_step[0]:,} samples x {per_step[1]:,}"
    for fact, name in FACTS.items():
        if settings.get(name) is not None:
            value = settings[name]
            facts[fact] = f"{value:,}" if isinstance(value, int) else str(value)
    return facts


def _validation_facts(folder: "CheckpointFolder") -> dict[str, str]:
    """Return the last validation of a checkpoint's run, by name, if it was of the same step. Raises
    UserError."""
    from stu.common.files import read_json_object
    from train.evaluation import RESULTS_FILE

    file = folder.path.resolve().parent.parent / RESULTS_FILE
    results = read_json_object(file) if file.is_file() else {}
    if results.get("step") != folder.training["global_step"]:
        return {}
    found = {name: (key, results[key]) for name, key in RESULTS.items() if key in results}
    for key, value in found.values():
        if not isinstance(value, int | float):
            fix = "delete the file, which only the model card needs"
            raise UserError(f"{file}: {key}", value, "a number", fix)
    return {name: f"{value:.4f}" for name, (_, value) in found.items()}


def _last_of_run(run_dir: Path) -> "CheckpointFolder":
    """Return the last checkpoint of a run, which may be deleted for a newer one meanwhile."""
    from train.checkpoint.resume import last_checkpoint, verified_checkpoint

    while True:
        path = last_checkpoint(run_dir).resolve()
        try:
            return verified_checkpoint(path)
        except UserError:
            if path.exists() or last_checkpoint(run_dir).resolve() == path:
                raise


if __name__ == "__main__":
    sys.exit(main())
