"""Rows whose log probabilities are computed, instead of completions."""

from collections.abc import Mapping, Sequence
from typing import Any

from serve.batch.rows import PromptRows, Row
from serve.completion import Completion
from serve.prompts import SETTINGS
from serve.scores import Scoring
from stu.common.errors import UserError, show
from stu.common.text import Json
from stu.tokenizer import Tokenizer


class ScoreRows(PromptRows):
    """Rows of `{"prompt": text or token ids, "completion": text or token ids, "id": ..}`. Only the
    prompt is required: it is scored if there is no completion, and otherwise the completion."""

    name = "scores"
    fields = ("prompt", "completion", "id")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def row(self, number: int, row_id: str | int, fields: Mapping[str, Any]) -> Row:
        """See `RowFormat.row`."""
        for key in fields:
            if key in SETTINGS:
                message = f"field {show(key)} is not allowed with --score, which generates nothing"
                raise UserError(key, message=f"{message}; leave it out")
        self.check_fields(fields)
        if "completion" in fields and fields["completion"] is None:
            raise UserError("completion", None, "a string or a list of token ids, or left out")
        scoring = Scoring(self._tokenizer, fields["prompt"], fields.get("completion"))
        return Row(number, row_id, {"scoring": scoring}, [scoring.request])

    def completed(self, row: Row, completions: Sequence[Completion]) -> Json:
        """Return `{"id", "row", "logprob", "num_tokens", "num_bytes", "bits_per_byte"}`, with null
        for the last if the text is empty."""
        scoring: Scoring = row.fields["scoring"]
        score = scoring.score(completions[0])
        return {
            "id": row.id,
            "row": row.number,
            "logprob": score.logprob,
            "num_tokens": score.num_tokens,
            "num_bytes": score.num_bytes,
            "bits_per_byte": score.bits_per_byte,
        }
