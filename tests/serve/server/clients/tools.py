"""Tools and responses for instructor, langchain-openai and litellm against the server at argv[1]: a
line of JSON for each answer.

Runs in the environment of tests/install_clients.sh."""

import json
import os
import sys
from typing import Annotated, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it asks the network for prices

import instructor
import litellm
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel, Field


class Step(BaseModel):
    kind: Literal["add", "subtract"]
    value: int


class Answer(BaseModel):
    """An answer."""

    title: Annotated[str, Field(max_length=8)]
    steps: Annotated[list[Step], Field(min_length=1, max_length=3)]
    note: Annotated[str, Field(max_length=4)] | None = None


def report(name, value):
    print(json.dumps([name, value]), flush=True)


url = sys.argv[1]
messages = [{"role": "user", "content": "Answer."}]
asked = {"model": "model", "messages": messages, "temperature": 0, "max_tokens": 400}
client = OpenAI(base_url=url, api_key="none", max_retries=0)

for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
    patched = instructor.from_openai(client, mode=mode)
    answer = patched.create(**asked, response_model=Answer, max_retries=0)
    report(f"instructor {mode.name}", answer.model_dump())
partial = instructor.from_openai(client, mode=instructor.Mode.TOOLS).create_partial(
    **asked, response_model=Answer, max_retries=0
)
report("instructor partial", [piece.model_dump() for piece in partial][-1])
patched = instructor.from_openai(client, mode=instructor.Mode.RESPONSES_TOOLS)
answer = patched.responses.create(
    model="model", input="Answer.", response_model=Answer, max_output_tokens=400, max_retries=0
)
report("instructor RESPONSES_TOOLS", answer.model_dump())

settings = {"base_url": url, "api_key": "none", "model": "model", "max_retries": 0}
for use_responses in (False, True):
    model = ChatOpenAI(**settings, temperature=0, max_tokens=400, use_responses_api=use_responses)
    name = f"langchain {'responses' if use_responses else 'chat'}"
    structured = model.with_structured_output(Answer, method="function_calling")
    report(f"{name} function_calling", structured.invoke("Answer.").model_dump())
    bound = model.bind_tools([Answer], tool_choice="any", parallel_tool_calls=False)
    called = bound.invoke("Answer.")
    (call,) = called.tool_calls
    report(f"{name} tools", call["args"])
    whole = None
    for chunk in bound.stream("Answer."):
        whole = chunk if whole is None else whole + chunk
    (streamed,) = whole.tool_calls
    report(f"{name} stream", streamed["args"])
    turns = [HumanMessage("Answer."), called, ToolMessage("5", tool_call_id=call["id"])]
    last = model.bind_tools([Answer]).invoke(turns, max_tokens=5)
    report(f"{name} next turn", last.usage_metadata["input_tokens"])
first = model.invoke("Answer.", max_tokens=5)
later = model.invoke("More.", max_tokens=5, previous_response_id=first.response_metadata["id"])
counts = [answer.usage_metadata["input_tokens"] for answer in (first, later)]
report("langchain previous_response_id", counts)

litellm.suppress_debug_info = True
own = {"api_base": url, "api_key": "none", "num_retries": 0}
tool = {
    "type": "function",
    "function": {"name": "Answer", "parameters": Answer.model_json_schema()},
}
chosen = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "Answer"}}}
asked = {**asked, **own, "model": "openai/model", "parallel_tool_calls": False}
whole = litellm.completion(**asked, **chosen)
(call,) = whole.choices[0].message.tool_calls
report("litellm tools", json.loads(call.function.arguments))
chunks = list(litellm.completion(**asked, **chosen, stream=True))
built = litellm.stream_chunk_builder(chunks, messages=messages)
(call,) = built.choices[0].message.tool_calls
report("litellm stream", json.loads(call.function.arguments))
responded = litellm.responses(
    model="openai/model",
    input="Answer.",
    temperature=0,
    max_output_tokens=400,
    tools=[{"type": "function", **tool["function"]}],
    tool_choice="required",
    parallel_tool_calls=False,
    **own,
)
report("litellm responses", json.loads(responded.output[0].arguments))
events = litellm.responses(
    model="openai/model", input="Answer.", max_output_tokens=5, stream=True, **own
)
report("litellm events", [str(getattr(event.type, "value", event.type)) for event in events][-1])
