"""instructor and langchain-openai against the server at argv[1]: a line of JSON for each answer.

Runs in the environment of tests/install_clients.sh."""

import json
import sys
from contextlib import suppress
from typing import Annotated, Literal

import instructor
from instructor.core import IncompleteOutputException
from langchain_openai import ChatOpenAI
from openai import LengthFinishReasonError, OpenAI
from pydantic import BaseModel, Field


class Step(BaseModel):
    kind: Literal["add", "subtract"]
    value: int


class Answer(BaseModel):
    """An answer."""

    title: Annotated[str, Field(max_length=8)]
    steps: Annotated[list[Step], Field(min_length=1, max_length=3)]
    note: Annotated[str, Field(max_length=4)] | None = None


class Anything(BaseModel):
    """Any object."""

    title: object = None


def report(name, value):
    print(json.dumps([name, value]), flush=True)


url = sys.argv[1]
asked = {"model": "model", "messages": [{"role": "user", "content": "Answer in JSON."}]}
client = OpenAI(base_url=url, api_key="none", max_retries=0)

for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON_O1):
    patched = instructor.from_openai(client, mode=mode)
    answer = patched.create(
        **asked, response_model=Answer, temperature=0, max_tokens=400, max_retries=0
    )
    report(f"instructor {mode.name}", answer.model_dump())
partial = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).create_partial(
    **asked, response_model=Answer, temperature=0, max_tokens=400, max_retries=0
)
report("instructor partial", [piece.model_dump() for piece in partial][-1])

# A model that knows no JSON ends few objects.
patched = instructor.from_openai(client, mode=instructor.Mode.JSON)
ended = []
for seed in range(8):
    with suppress(IncompleteOutputException):
        answer = patched.create(
            **asked, response_model=Anything, seed=seed, max_tokens=200, max_retries=0
        )
        ended.append(answer.model_dump(mode="json"))
report("instructor JSON", ended)

settings = {"base_url": url, "api_key": "none", "model": "model", "max_retries": 0}
model = ChatOpenAI(**settings, temperature=0, max_tokens=400)
for strict in (None, True):
    structured = model.with_structured_output(Answer, method="json_schema", strict=strict)
    report(f"langchain json_schema {strict}", structured.invoke("Answer.").model_dump())
structured = model.with_structured_output(Answer.model_json_schema(), method="json_schema")
report("langchain stream", list(structured.stream("Answer."))[-1])
ended = []
for seed in range(8):
    model = ChatOpenAI(**settings, seed=seed, max_tokens=200)
    structured = model.with_structured_output({"title": "Anything"}, method="json_mode")
    with suppress(LengthFinishReasonError):
        ended.append(structured.invoke("Answer in JSON."))
report("langchain json_mode", ended)
