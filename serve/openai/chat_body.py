"""From a body of OpenAI's chat completions to one of text completions, the same for a server and
for batches."""

from serve.openai.chat import ChatTemplate
from serve.openai.schemas import ChatBody
from stu.common.text import Json


def text_body(
    body: ChatBody, template: ChatTemplate, max_seq_len: int, default_new_tokens: int
) -> Json:
    """Return a body for `serve.openai.completions`, without nulls, whose prompt is the chat's.

    Without a limit of its own, a chat may have `default_new_tokens`, or what room there is.

    Raises ValueError naming a field that is not allowed or not served, and what to do.
    """
    given = body.model_dump(exclude={"messages"}, exclude_none=True)
    messages = [
        {"role": its.role, "content": its.text, **({"name": its.name} if its.name else {})}
        for its in body.messages
    ]
    variables = given.pop("chat_template_kwargs", {})
    given["prompt"] = template.tokens(messages, variables)
    older = given.pop("max_tokens", None)
    most = given.pop("max_completion_tokens", older)
    if older not in (None, most):
        raise ValueError(
            f"max_tokens={older} and max_completion_tokens={most} differ: give one of them"
        )
    room = max(1, max_seq_len - len(given["prompt"]))
    given["max_tokens"] = min(default_new_tokens, room) if most is None else most
    asks, top = given.pop("logprobs", False), given.pop("top_logprobs", 0)
    if top and not asks:
        raise ValueError("top_logprobs goes with logprobs=true alone: give both")
    if asks:
        given["logprobs"] = top
    return given
