"""Conversations among the sources of a run: their chat template, and answers to validate."""

from collections.abc import Mapping, Sequence

from stu.chat.template import FILE_NAME as CHAT_TEMPLATE
from stu.common.errors import UserError
from train.data.mixture import Source


def chat_template(sources: Sequence[Source]) -> bytes | None:
    """Return the template that wrote the conversations of all sources; None without any.

    Raises UserError if sources have different templates.
    """
    found: dict[bytes, Source] = {}
    for source in sources:
        file = source.train.folder / CHAT_TEMPLATE
        if source.train.index.chat_seq_len and file.is_file():
            found.setdefault(file.read_bytes(), source)
    if len(found) > 1:
        first, second = (source.train.folder for source in [*found.values()][:2])
        raise UserError(
            str(second),
            message=f"{second / CHAT_TEMPLATE}: another chat template than that of {first}; "
            "prepare one of them again, with --chat-template and the file of the other",
        )
    return next(iter(found), None)


def require_answers(
    sources: Sequence[Source], validated: Mapping[str, float], max_validation_tokens: int
) -> None:
    """Raise UserError if a validation would read no answer of a source of conversations.

    Args:
        sources: All sources.
        validated: Names of those with a validation.
        max_validation_tokens: Targets of a validation, of which each source has an equal part.
    """
    count = max(1, max_validation_tokens // len(validated))
    for source in sources:
        answers = source.validation.answers
        if source.name not in validated or answers is None or answers[1 : count + 1].any():
            continue
        (places,) = answers[1:].nonzero()
        if not len(places):
            folder = source.validation.folder
            message = f"{folder}: no conversation of the validation split has an answer; prepare "
            message += "it again with a larger --validation-fraction"
            raise UserError(str(folder), message=message)
        raise UserError(
            "data.max_validation_tokens",
            max_validation_tokens,
            f"at least {(int(places[0]) + 1) * len(validated):,}, with which the validation reads "
            f"an answer{source.label}",
        )
