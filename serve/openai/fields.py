"""Fields of OpenAI's and vLLM's bodies that change nothing here: accepted, or refused by name.

A field is accepted if the answer is the same with it as without it, or if its value asks for what
is done anyway. Any other value would change the answer and is refused with what to do instead. All
other fields are declared in `serve.openai.schemas`; `docs/http-api.md` has a table of both kinds.
"""

from collections.abc import Mapping
from typing import Any

from stu.common.errors import UserError
from stu.common.text import Json

Neutral = Mapping[str, tuple[tuple[Any, ...], str]]
"""For the name of a field, the values that are accepted, and what to do instead of any other."""

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
    "session_id": str,
    "include_reasoning": bool,
    "guided_decoding_backend": str,
    "spaces_between_special_tokens": bool,
}
"""Fields that change no answer, with the type of their values."""

_NO_TOOLS = "use /v1/chat/completions, where the model may call tools"
_NO_EFFECT = "leave it out"
_TOKENS = "use logprobs, which have the text and the bytes of each token"

NEUTRAL: Neutral = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "web_search_options": ((), "the model does not search the web, leave it out"),
    "modalities": ((["text"],), 'the model writes only text, leave it out or give ["text"]'),
    "audio": ((), "the model writes only text, leave it out"),
    "moderation": ((), "there is no moderation, leave it out"),
    "reasoning_effort": (
        ("none",),
        'the model has no separate reasoning, leave it out or give "none"',
    ),
    "thinking_token_budget": ((), "the model has no separate reasoning, leave it out"),
    "verbosity": (("medium",), "ask for a shorter or longer answer in a message"),
    "include_stop_str_in_output": ((False,), "add the stop string to the text yourself"),
    "use_beam_search": ((False,), "ask for n completions with logprobs, and choose among them"),
    "length_penalty": ((1, 1.0), "there is no beam search, leave it out"),
    "truncation_side": (("left",), "shorten the prompt yourself"),
    "prompt_embeds": ((), "give a prompt of text or token ids"),
    "logprob_token_ids": ((), "use logprobs"),
    "allowed_token_ids": ((), "use response_format, or logit_bias"),
    "bad_words": (([],), "use logit_bias"),
    "request_id": ((), "send the header X-Request-Id"),
    "return_tokens_as_token_ids": ((False,), _TOKENS),
    "return_token_ids": ((False,), _TOKENS),
    "return_token_offsets": ((False,), "use logprobs of /v1/completions, which have text_offset"),
    "return_prompt_text": ((False,), "use echo of /v1/completions"),
    "stream_interval": ((1,), "each piece is sent at once, leave it out"),
    "repetition_detection": ((), "use frequency_penalty"),
    "watermarking": ((False,), _NO_EFFECT),
    "kv_transfer_params": ((), _NO_EFFECT),
    "ec_transfer_params": ((), _NO_EFFECT),
    "vllm_xargs": (({},), _NO_EFFECT),
    "mm_processor_kwargs": (({},), "the model reads only text, leave it out"),
    "media_io_kwargs": (({},), "the model reads only text, leave it out"),
}
TEXT_NEUTRAL: Neutral = {
    **NEUTRAL,
    "suffix": (("",), 'the model writes only after the prompt, leave it out or give ""'),
    "add_special_tokens": ((True,), "give the prompt as token ids, to which nothing is added"),
}
CHAT_HARMLESS = {name: kind for name, kind in HARMLESS.items() if name != "parallel_tool_calls"}
CHAT_NEUTRAL: Neutral = {
    **{name: NEUTRAL[name] for name in NEUTRAL.keys() - {"tools", "tool_choice"}},
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "echo": ((False,), "use /v1/completions"),
    "add_special_tokens": ((False,), "the chat template decides, leave it out"),
    "add_generation_prompt": ((True,), "use /v1/completions"),
    "continue_final_message": ((False,), "use /v1/completions"),
    "documents": (([],), "put their text into a message"),
    "chat_template": ((), "the model has its own template: leave it out, or use /v1/completions"),
}
EMBEDDING_NEUTRAL: Neutral = {
    name: TEXT_NEUTRAL[name]
    for name in (
        "add_special_tokens",
        "mm_processor_kwargs",
        "request_id",
        "truncation_side",
    )
}

MESSAGE_HARMLESS: Mapping[str, type] = {"annotations": list, "parsed": object, "id": str}
"""Fields of a message that OpenAI's client returns, which repeat what its content says."""
MESSAGE_NEUTRAL: Neutral = {
    "refusal": ((), "put its text into content"),
    "audio": ((), "put its transcript into content"),
    "function_call": ((), "use tool_calls"),
    "reasoning": (("",), "put it into content or leave it out"),
    "reasoning_content": (("",), "put it into content or leave it out"),
    "type": (("text", "message"), "leave it out"),
}
CALL_HARMLESS: Mapping[str, type] = {"parsed_arguments": object, "index": int}
PART_HARMLESS: Mapping[str, type] = {
    "annotations": list,
    "cache_control": dict,
    "prompt_cache_breakpoint": dict,
}


_TYPES = {
    str: "a string",
    dict: "an object",
    bool: "true or false",
    list: "a list",
    int: "a whole number",
}


def without_inert(body: Mapping[str, Any], harmless: Mapping[str, type], neutral: Neutral) -> Json:
    """Return `body` without nulls and without the fields that change nothing.

    Raises UserError for a field whose value would change the answer.
    """
    fields: Json = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in harmless:
            if not isinstance(value, harmless[name]):
                raise UserError(name, value, _TYPES[harmless[name]])
        elif name in neutral:
            accepted, fix = neutral[name]
            if not any(type(value) is type(other) and value == other for other in accepted):
                raise UserError(name, value, fix=fix)
        else:
            fields[name] = value
    return fields
