"""Lines on the data that a run will read, which `stu-plan` and `stu-train` share."""

from typing import Any

from train.data.loader import TokenData
from train.data.rows.packing import effects


def data_notes(data: TokenData, settings: Any, num_ranks: int) -> list[str]:
    """Return lines on what a run will read, and warnings."""
    warnings = [f"warning: {text}" for text in data_warnings(data, settings, num_ranks)]
    return [*describe_sources(data, settings, num_ranks), *describe_rows(data), *warnings]


def data_warnings(data: TokenData, settings: Any, num_ranks: int) -> list[str]:
    """Return warnings about token shards that are too small for this run."""
    trainer, found = settings.trainer, []
    groups = num_ranks // settings.parallel.context
    a_step = groups * data.micro_batch_size * trainer.accumulate_grad_batches
    for source in data.sources:
        num_samples = data.num_samples(source.name)
        if num_samples < round(a_step * data.weights.get(source.name, 0)):
            found.append(
                f"the {len(source.train):,} tokens for training{source.label} are {num_samples:,} "
                f"samples of data.seq_len={data.seq_len}, and a step reads {a_step:,}"
                f"{' of all sources' if source.name else ''}: some are read several times in one "
                "step; prepare more text, or lower data.micro_batch_size, "
                "trainer.accumulate_grad_batches or data.seq_len"
            )
        num_targets = len(source.validation) - 1
        if source.name in data.validated and num_targets < data.seq_len:
            found.append(
                f"the validation split{source.label} has {num_targets:,} tokens to predict, fewer "
                f"than one sample of data.seq_len={data.seq_len}: its loss says little; prepare "
                "the text with a larger --validation-fraction"
            )
    return found


def describe_sources(data: TokenData, settings: Any, num_ranks: int) -> list[str]:
    """Return a line for each source of a mixture: its share of a run, and how often it is read."""
    trainer = settings.trainer
    groups = max(1, num_ranks // settings.parallel.context)
    a_step = groups * data.micro_batch_size * trainer.accumulate_grad_batches
    position = trainer.max_steps * a_step
    epochs = data.epochs(position, a_step)
    return [
        f"{name}: {count * data.num_samples(name) / position:.2%} of the samples, "
        f"{data.num_samples(name) * data.seq_len:,} tokens read {count:.2f} times in "
        f"{trainer.max_steps:,} steps"
        for name, count in epochs.items()
    ]


def describe_rows(data: TokenData) -> list[str]:
    """Return a line for each source on what its samples do to documents, in either packing, by the
    first of its documents. Conversations, and sources of an older stu-prepare, have none."""
    return [
        f"data.packing{source.label}: {effects(source.train.documents, data.seq_len)}"
        for source in data.sources
        if source.is_packable
    ]
