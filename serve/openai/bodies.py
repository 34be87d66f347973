"""Objects in the bodies of requests: fields that change nothing, and unknown ones."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from serve.openai.errors import located
from serve.openai.fields import Neutral, without_inert
from stu.common.errors import UserError


class Body(BaseModel):
    """An object in the body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    harmless: ClassVar[Mapping[str, type]] = {}
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, values: Any) -> Any:
        """Leave out nulls and fields that change nothing, and refuse the first unknown field."""
        if not isinstance(values, dict):
            return values
        try:
            values = without_inert(values, cls.harmless, cls.neutral)
            for name in values:
                if name not in cls.model_fields:
                    raise _unknown(name, list(cls.model_fields))
        except UserError as error:
            raise located(error) from error
        return values


def _unknown(name: str, known: list[str]) -> UserError:
    similar = difflib.get_close_matches(name[:100], known, n=1)
    fix = f"did you mean {json.dumps(similar[0])}?" if similar else "leave it out"
    return UserError(name, fix=f"there is no such field, {fix}")
