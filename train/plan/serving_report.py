"""The plan of decoding as a table: which GPUs hold a model, at which batch, and how fast."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stu.common.errors import UserError
from train.gpus import GPUS
from train.plan.costs import PRODUCT_SHARE, USABLE_SHARE
from train.plan.report import GIB, LOG_COLUMNS
from train.plan.serving import READ_SHARE, Decoding, plans, read_model_config


def show_serving(
    path: Path, gpu_names: Sequence[str], num_gpus: int, batch: int, length: int | None, bits: int
) -> int:
    """Print what to expect of a model that decodes on GPUs. Returns 1 if it fits on none, else 0.

    Args:
        path: Model directory, or a file of its settings.
        gpu_names: GPUs, as in `train.gpus.GPUS`.
        num_gpus: Most GPUs of a host that divide a model.
        batch: Sequences that decode together.
        length: Tokens of each, prompt and new ones; None: as many as the model takes.
        bits: Bits of a weight.

    Raises UserError.
    """
    config = read_model_config(path)
    length = length or config.max_seq_len
    if length > config.max_seq_len:
        raise UserError("--length", length, f"at most max_seq_len={config.max_seq_len}")
    found = plans(config, length, length // 2, bits, num_gpus)
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    table = Table(
        *("GPUs", "weights", "caches", "total", "usable", "fits", "most", "ms/step", "tokens/s"),
        title=f"GiB on each GPU for {batch} sequences of {length:,} tokens, half of them new",
    )
    fits_somewhere = False
    for name in gpu_names:
        for own in found:
            gpu, fits = GPUS[name], own.fits(GPUS[name], batch)
            fits_somewhere |= fits
            cache_gib = math.ceil(100 * own.cache_bytes(batch) / GIB) / 100
            usable = USABLE_SHARE * gpu.memory_gib
            seconds = own.step_seconds(gpu, batch)
            table.add_row(
                f"{own.num_ranks} x {name}",
                f"{own.weight_bytes() / GIB:.2f}",
                f"{cache_gib:.2f}",
                f"{own.total_bytes(batch) / GIB:.2f}",
                f"{usable:.1f}",
                "yes" if fits else "no",
                str(own.largest_batch(gpu)),
                f"{1000 * seconds:.2f}" if fits else "",
                f"{batch / seconds:,.0f}" if fits else "",
            )
    console.print(_describe(found[0]))
    console.print(table)
    console.print(
        "most: maximum number of sequences that fit. caches: the --cache-gib that an engine needs "
        f"for this, with --max-running {batch}; by default, it takes half of the free memory. A "
        f"step is assumed to read weights and caches at {READ_SHARE:.0%} of the bandwidth, or to "
        f"compute products at {PRODUCT_SHARE:.0%} of the peak, whichever takes longer; this has "
        "not been compared with a GPU yet. Prefill is not included."
    )
    if not fits_somewhere:
        console.print(
            "It fits on none of these: give more --gpus, or less --batch, --length or --bits."
        )
    return 0 if fits_somewhere else 1


def _describe(one: Decoding) -> str:
    cache = "in pages" if one.rank is None else f"as states of rank {one.rank}"
    return (
        f"{one.config.layout}, {one.config.num_layers} layers x {one.config.width}; "
        f"{one.bits}-bit weights; long convolutions are cached {cache}; "
        f"{one.row_bytes() / 2**20:.1f} MiB per sequence on one GPU"
    )
