"""Fields of OpenAI's and vLLM's bodies that decide nothing here: taken as they are, or refused.

A field is taken if the answer is the same with it as without, or if it has the one value that asks
for what is done anyway; any other value would change the answer, and is refused by name. All other
fields are declared in `serve.openai.schemas`. `docs/serving.md` has a table of both kinds.
"""

from collections.abc import Mapping
from typing import Any

from stu.common.errors import show
from stu.common.text import Json

Neutral = Mapping[str, tuple[tuple[Any, ...], str]]
"""By name: values that ask for what is done anyway, and what to do in place of another."""

HARMLESS: Mapping[str, type] = {
    "user": str,
    "safety_identifier": str,
    "metadata": dict,
    "store": bool,
    "service_tier": str,
    "parallel_tool_calls": bool,
    "prediction": dict,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
    "cache_salt": str,
    "session_id": str,
    "include_reasoning": bool,
    "spaces_between_special_tokens": bool,
}
"""Fields that change no answer, with the type that their values have."""

_NO_TOOLS = "the model calls no tools: leave it out"
_NO_EFFECT = "leave it out"
_SCHEMAS = "use response_format"
_TOKENS = "use logprobs, whose tokens have names and bytes"
_PROMPT = "shorten the prompt yourself"

NEUTRAL: Neutral = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "web_search_options": ((), "nothing is searched: leave it out"),
    "modalities": ((["text"],), 'only text is written: leave it out, or give ["text"]'),
    "audio": ((), "only text is written: leave it out"),
    "moderation": ((), "nothing is moderated: leave it out"),
    "reasoning_effort": (("none",), 'the model does not reason apart: leave it out, or "none"'),
    "thinking_token_budget": ((), "the model does not reason apart: leave it out"),
    "verbosity": (("medium",), "ask for a shorter or longer answer in a message"),
    "include_stop_str_in_output": ((False,), "add the stop string to the text yourself"),
    "skip_special_tokens": ((True,), "special tokens have no text: leave it out"),
    "use_beam_search": ((False,), "use n completions, and logprobs to choose among them"),
    "length_penalty": ((1, 1.0), "it goes with use_beam_search, which is not done: leave it out"),
    "truncate_prompt_tokens": ((), _PROMPT),
    "truncation_side": ((), _PROMPT),
    "prompt_logprobs": ((), "use echo with logprobs, at /v1/completions"),
    "prompt_embeds": ((), "give a prompt"),
    "logprob_token_ids": ((), "use logprobs"),
    "allowed_token_ids": ((), "use response_format, or logit_bias"),
    "bad_words": (([],), "use logit_bias"),
    "structured_outputs": ((), _SCHEMAS),
    "guided_json": ((), _SCHEMAS),
    "guided_regex": ((), _SCHEMAS),
    "guided_choice": ((), _SCHEMAS),
    "guided_grammar": ((), _SCHEMAS),
    "priority": ((0,), "requests are served in the order in which they come: leave it out"),
    "request_id": ((), "send the header X-Request-Id"),
    "return_tokens_as_token_ids": ((False,), _TOKENS),
    "return_token_ids": ((False,), _TOKENS),
    "return_token_offsets": ((False,), "use logprobs at /v1/completions, which have text_offset"),
    "return_prompt_text": ((False,), "use echo, at /v1/completions"),
    "stream_interval": ((1,), "pieces are sent as they come: leave it out"),
    "repetition_detection": ((), "use frequency_penalty"),
    "watermarking": ((False,), _NO_EFFECT),
    "kv_transfer_params": ((), _NO_EFFECT),
    "ec_transfer_params": ((), _NO_EFFECT),
    "vllm_xargs": (({},), _NO_EFFECT),
    "mm_processor_kwargs": (({},), "only text is read: leave it out"),
    "media_io_kwargs": (({},), "only text is read: leave it out"),
}
TEXT_NEUTRAL: Neutral = {
    **NEUTRAL,
    "suffix": (("",), 'text is written after the prompt only: leave it out, or ""'),
    "add_special_tokens": ((True,), "give the prompt as token ids, which are taken as they are"),
}
CHAT_NEUTRAL: Neutral = {
    **NEUTRAL,
    "echo": ((False,), "use /v1/completions"),
    "add_special_tokens": ((False,), "the chat template decides: leave it out"),
    "add_generation_prompt": ((True,), "use /v1/completions"),
    "continue_final_message": ((False,), "use /v1/completions"),
    "documents": (([],), "put their text into a message"),
    "chat_template": ((), "the model's own is used: leave it out, or use /v1/completions"),
}

MESSAGE_HARMLESS: Mapping[str, type] = {"annotations": list, "parsed": object, "id": str}
"""Parts of a message as OpenAI's client returns it that say again what its content says."""
MESSAGE_NEUTRAL: Neutral = {
    "refusal": ((), "put its text into content"),
    "audio": ((), "put its transcript into content"),
    "tool_calls": (([],), "the model calls no tools: put what was called into content"),
    "function_call": ((), "the model calls no tools: put what was called into content"),
    "reasoning": (("",), "put it into content, or leave it out"),
    "reasoning_content": (("",), "put it into content, or leave it out"),
}
PART_HARMLESS: Mapping[str, type] = {"cache_control": dict, "prompt_cache_breakpoint": dict}


def without_inert(body: Mapping[str, Any], harmless: Mapping[str, type], neutral: Neutral) -> Json:
    """Return `body` without nulls and without the fields that change nothing.

    Raises ValueError naming a field whose value would change the answer, and what to do.
    """
    left: Json = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in harmless:
            if not isinstance(value, harmless[name]):
                kind = {str: "a string", dict: "an object", bool: "true or false", list: "a list"}
                raise ValueError(
                    f"{name}={show(value)} is not allowed: it must be {kind[harmless[name]]}"
                )
        elif name in neutral:
            values, fix = neutral[name]
            if not any(type(value) is type(its) and value == its for its in values):
                raise ValueError(f"{name}={show(value)} is not served here: {fix}")
        else:
            left[name] = value
    return left
