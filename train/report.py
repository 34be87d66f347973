"""Results of a training run: its loss curve, and baselines that need no model."""

import gzip
import math
from pathlib import Path

import numpy as np

from stu.tokenizer import read_tokenizer
from train.data.shards import TokenShards

Curve = tuple[list[int], list[float]]
"""Steps, and the value at each."""


def unigram_bits_per_byte(data: Path) -> float:
    """Return the cross-entropy of the validation tokens under the training tokens' frequencies.

    In bits per byte of validation text, with add-one smoothing.
    """
    train, validation = TokenShards(data, "train"), TokenShards(data, "validation")
    counts = np.ones(train.index.vocab_size)
    for start in range(0, len(train), 2**24):
        tokens = train.read(start, min(start + 2**24, len(train)))
        counts += np.bincount(tokens, minlength=len(counts))
    bits = np.log2(counts.sum() / counts)  # per token
    total_bits = float(bits[validation.read(0, len(validation))].sum())
    return total_bits / validation.split.num_bytes


def gzip_bits_per_byte(data: Path) -> float:
    """Return the bits that gzip -9 takes per byte of the validation text."""
    text = "".join(validation_documents(data)).encode()
    return 8 * len(gzip.compress(text, 9)) / len(text)


def validation_documents(data: Path) -> list[str]:
    """Return the validation split as text, document by document."""
    shards = TokenShards(data, "validation")
    tokenizer = read_tokenizer(shards.tokenizer_path)
    tokens = shards.read(0, len(shards))
    if tokenizer.start_ids:
        starts = np.flatnonzero(tokens == tokenizer.bos_id)[1:]
    else:
        starts = np.flatnonzero(tokens[:-1] == tokenizer.eos_id) + 1
    return [tokenizer.decode(document.tolist()) for document in np.split(tokens, starts)]


def read_curves(run: Path) -> dict[str, Curve]:
    """Return all scalars in the TensorBoard files of the run in folder `run`, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, Curve] = {}
    for folder in sorted({events.parent for events in run.rglob("events.out.tfevents.*")}):
        log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        log.Reload()
        for tag in log.Tags()["scalars"]:
            steps, values = curves.setdefault(tag, ([], []))
            for event in log.Scalars(tag):
                steps.append(event.step)
                values.append(event.value)
    return curves


def plot_bits_per_byte(
    curves: dict[str, Curve], bytes_per_token: float, baselines: dict[str, float], path: Path
) -> None:
    """Plot training and validation loss over steps, and baselines as dashed lines, as a PNG.

    bytes_per_token: Converts the training loss from nats per token to bits per byte.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    steps, losses = curves["train/loss"]
    bits = [loss / math.log(2) / bytes_per_token for loss in losses]
    axes.plot(steps, bits, color="#9ecae1", linewidth=1, label="training batches")
    axes.plot(
        *curves["val/bits_per_byte"], color="#08519c", marker="o", clip_on=False, label="validation"
    )
    for (name, value), color in zip(baselines.items(), ("#636363", "#d94801"), strict=False):
        axes.axhline(value, color=color, linestyle="--", linewidth=1)
        label, transform = f"{name}\n{value:.2f}", axes.get_yaxis_transform()
        axes.text(1.01, value, label, color=color, va="center", transform=transform)
    axes.set(xlabel="step", ylabel="bits per byte", xlim=(0, max(steps)))
    axes.set_ylim(0.9 * min(bits), min(max(bits), 1.5 * max(baselines.values())))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
    pyplot.close(figure)
