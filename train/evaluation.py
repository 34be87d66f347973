"""Validation: loss and accuracy of the next token, accuracy by context, and samples."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stu.common.files import new_file
from stu.model import FlashSTU
from stu.sequences.documents import Documents
from stu.tokenizer import Tokenizer
from train.callbacks.progress import warned

RESULTS_FILE = "validation.json"
"""File in a run's folder with step and metrics of its last validation."""
NUM_SAMPLES, PROMPT_TOKENS, NEW_TOKENS, TEMPERATURE = 4, 64, 64, 0.8


class ValidationSums:
    """Sums over targets in float64, which can be added up over ranks.

    Hits are counted by context, the number of tokens before a target: 1, 2 to 3, 4 to 7 and so on.

    Args:
        seq_len: Targets of a sequence.
        bytes_per_token: Bytes of each token's text, `[vocab_size]`.
        own: Targets of a sequence that `add` is given, T of them.
    """

    def __init__(self, seq_len: int, bytes_per_token: Tensor, own: slice = slice(None)) -> None:
        self._bytes_per_token = bytes_per_token  # [vocab_size]
        self._groups = torch.arange(1, seq_len + 1).log2().floor().long()  # [seq_len]
        self.values = torch.zeros(2 + 2 * (int(self._groups[-1]) + 1), dtype=torch.float64)
        """Nats, bytes of the targets' text, then hits and targets by context."""
        self._group = self._groups[own]  # [T]

    def add(
        self,
        nats: Tensor,
        hits: Tensor,
        targets: Tensor,
        counted: Tensor,
        documents: Documents | None = None,
    ) -> None:
        """Add a batch, all `[B, T]`.

        Args:
            nats: Losses of the targets.
            hits: Whether the target was the likeliest token.
            targets: Tokens to predict.
            counted: Whether the target counts.
            documents: Documents that are kept apart, of which contexts are parts.
        """
        counted = counted.cpu()
        own = self._group if documents is None else self._groups[documents.positions.cpu()]
        groups = own.expand(counted.shape)[counted]
        right = groups[hits.cpu()[counted]]
        num_groups = (len(self.values) - 2) // 2
        self.values[0] += nats.cpu()[counted].double().sum()
        self.values[1] += self._bytes_per_token[targets.cpu()[counted]].sum()
        self.values[2 : 2 + num_groups] += right.bincount(minlength=num_groups)
        self.values[2 + num_groups :] += groups.bincount(minlength=num_groups)


def mixture_metrics(values: Tensor, shares: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics to log of one or more sources, given their sums over all ranks.

    Those of a mixture are what its targets have on average if each source has its share of them;
    then follow the losses of each source. A source without targets that count has no part in them.

    Args:
        values: `ValidationSums.values` of each source, `[sources, n]`.
        shares: Share of each source by name; a source alone may have no name.
    """
    if list(shares) == [""]:
        return validation_metrics(values[0])
    num_targets = (
        values[:, 2:].reshape(len(values), 2, -1)[:, 1].sum(1, keepdim=True)
    )  # [sources, 1]
    weights = torch.tensor(list(shares.values()), dtype=values.dtype)[:, None]
    # Without targets, the values are 0 too.
    metrics = validation_metrics((weights * values / num_targets.clamp(min=1)).sum(0))
    for name, own in zip(shares, map(validation_metrics, values), strict=True):
        for key in ("loss", "bits_per_byte"):
            if f"val/{key}" in own:
                metrics[f"val_{key}/{name}"] = own[f"val/{key}"]
    return metrics


def validation_metrics(values: Tensor) -> dict[str, float]:
    """Return the metrics of one source, given the sums' `values` over all ranks.

    They are those that exist: none without targets, no bits per byte if the targets have no text.
    """
    nats, num_bytes = values[:2].tolist()
    hits, targets = values[2:].view(2, -1).tolist()
    by_context = {
        context_tag(2**group): right / count
        for group, (right, count) in enumerate(zip(hits, targets, strict=True))
        if count
    }
    if not sum(targets):
        return {}
    bits = {"val/bits_per_byte": nats / math.log(2) / num_bytes} if num_bytes else {}
    return {
        "val/loss": nats / sum(targets),
        **bits,
        "val/accuracy": sum(hits) / sum(targets),
        **by_context,
    }


def context_tag(num_tokens: int) -> str:
    """Return the name of the accuracy after `num_tokens` to twice as many tokens."""
    return f"accuracy_by_context/from_{num_tokens:06d}_tokens"


def write_results(metrics: dict[str, float], step: int, run_dir: str | Path) -> None:
    """Write the metrics of a validation as JSON, and plot the accuracy by context.

    Warns if that fails, as a run can do without.
    """
    with warned("the results of a validation"):
        with new_file(Path(run_dir, RESULTS_FILE)) as temporary:
            temporary.write_text(json.dumps({"step": step, **metrics}, indent=1) + "\n")
        plot_accuracy(metrics, Path(run_dir, "accuracy-by-context.png"))


def validated_step(run_dir: Path) -> int | None:
    """Return the step of the last validation; None if there is no readable `validation.json`."""
    try:
        step: int = json.loads((run_dir / RESULTS_FILE).read_text())["step"]
    except (OSError, ValueError):
        return None
    return step


def plot_accuracy(metrics: dict[str, float], path: Path) -> None:
    """Plot the accuracy by context as a PNG: where it rises, longer context helps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    start = context_tag(0).split("_0")[0]
    points = {
        int(name.removeprefix(f"{start}_").removesuffix("_tokens")): 100 * value
        for name, value in metrics.items()
        if name.startswith(start)
    }
    figure, axes = pyplot.subplots(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes.plot(list(points), list(points.values()), color="black", marker="o", clip_on=False)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        xlabel="tokens read, from .. to twice as many",
        ylabel="next token is the likeliest, %",
        xlim=(1, max([2, *points])),
        ylim=(0, None),
    )
    axes.spines[["top", "right"]].set_visible(False)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


@torch.no_grad()
def sample_texts(
    model: FlashSTU, tokens: Tensor, tokenizer: Tokenizer, num_sources: int = 1
) -> list[str]:
    """Return the first rows of `tokens [B, T]` as text, with continuations, in Markdown.

    They are at most four, or, of several sources, at least one of each.

    Sampling is the same at every call, and does not use PyTorch's global generators. Collective:
    the whole sequence is computed for each token, wherever the weights are.
    """
    num_read = min(PROMPT_TOKENS, tokens.shape[1] // 2)
    num_all = min(num_read + NEW_TOKENS, model.config.max_seq_len)
    num_rows = min(max(1, NUM_SAMPLES // num_sources), len(tokens))
    text = tokens.new_zeros(num_rows, num_all)
    text[:, :num_read] = tokens[: len(text), :num_read]
    generator = torch.Generator().manual_seed(0)
    for place in range(num_read, num_all):
        hidden = model.hidden(text)[:, place - 1]  # [B, D]; tokens to the right are not seen
        odds = (model.logits(hidden).float() / TEMPERATURE).softmax(-1).cpu()
        text[:, place] = torch.multinomial(odds, 1, generator=generator)[:, 0].to(text.device)
    return [
        f"{_code(tokenizer.decode(row[:num_read]))}\n\n**continuation:**\n\n"
        f"{_code(tokenizer.decode(row[num_read:]))}"
        for row in text.tolist()
    ]


def _code(text: str) -> str:
    """Return `text` as a Markdown block that is shown literally."""
    return "\n".join(f"    {line}" for line in text.splitlines())
