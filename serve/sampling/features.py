"""Work that a step of the sampler does, and the settings of its rows as numbers."""

from dataclasses import dataclass

from serve.sampling.processors import LOGITS_PROCESSORS, WEIGHT_PROCESSORS, Processor
from serve.sampling.tables import Table
from serve.sampling_params import MOST_LOGPROBS, SamplingParams

PROCESSORS = [*LOGITS_PROCESSORS, *WEIGHT_PROCESSORS]
DEFAULTS = SamplingParams()
FEW, ALL = 64, 2**31


@dataclass(frozen=True)
class Features:
    """Work that a step does. More than its rows need takes time, but changes no token."""

    fields: frozenset[str] = frozenset()
    """Fields of `SamplingParams` whose processors run."""
    is_masked: bool = False
    """Whether tokens may be forbidden, by a constraint or `min_new_tokens`."""
    is_random: bool = False
    """Whether a temperature may be above 0."""
    num_logprobs: int = -1
    """Number of most probable tokens that are reported beside each token's own log probability; -1:
    no log probabilities."""
    most_kept: int = 0
    """Most tokens among which a random choice is made: few where top-k is small for all rows."""

    def __or__(self, other: "Features") -> "Features":
        return Features(
            self.fields | other.fields,
            self.is_masked or other.is_masked,
            self.is_random or other.is_random,
            max(self.num_logprobs, other.num_logprobs),
            max(self.most_kept, other.most_kept),
        )

    def runs(self, processor: Processor) -> bool:
        """Return whether a processor runs."""
        return not self.fields.isdisjoint(processor.fields)

    @property
    def changes_logits(self) -> bool:
        """Whether a processor changes logits."""
        return any(map(self.runs, LOGITS_PROCESSORS))

    @property
    def tables(self) -> set[Table]:
        """Tables over the vocabulary that the work reads."""
        names: set[Table] = {"allowed"} if self.is_masked else set()
        return names.union(*(processor.tables for processor in filter(self.runs, PROCESSORS)))


GREEDY = Features()
"""Work of rows with the default settings."""
EVERYTHING = Features(
    frozenset(name for processor in PROCESSORS for name in processor.fields),
    is_masked=True,
    is_random=True,
    num_logprobs=MOST_LOGPROBS,
    most_kept=ALL,
)
"""Work of any rows."""


def features_needed(params: SamplingParams, has_stop_ids: bool) -> Features:
    """Return the work that a request needs. has_stop_ids: Whether any token ends its text."""
    is_random = params.temperature > 0
    running = PROCESSORS if is_random else LOGITS_PROCESSORS
    names = (name for processor in running for name in processor.fields)
    fields = frozenset(n for n in names if getattr(params, n) != getattr(DEFAULTS, n))
    most_kept = (FEW if 0 < params.top_k <= FEW else ALL) if is_random else 0
    return Features(
        fields,
        params.constraint is not None or (has_stop_ids and params.min_new_tokens > 0),
        is_random,
        -1 if params.logprobs is None else params.logprobs,
        most_kept,
    )


def settings_of(params: SamplingParams, features: Features) -> dict[str, float]:
    """Return the settings that are numbers, by the name of their column."""
    values = {name: getattr(params, name) for name in ("temperature", *sorted(EVERYTHING.fields))}
    # Without stop tokens there is nothing to forbid, and no mask of the row is written.
    masked_tokens = params.min_new_tokens if features.is_masked else 0
    derived = {
        "masked_tokens": masked_tokens if params.constraint is None else MOST_TOKENS,
        "changes_logits": features.changes_logits,
    }
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {**numbers, **derived}


MOST_TOKENS = 2**31
"""More tokens than any text has."""
NEUTRAL = settings_of(DEFAULTS, GREEDY)
"""Settings of a row without a request."""
