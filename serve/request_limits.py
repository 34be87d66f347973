"""What a model can be asked, whatever the engine."""

from serve.request import Request
from stu.config import ModelConfig


class ContextLengthError(ValueError):
    """A prompt and its new tokens are more than the model can hold."""

    code = "context_length_exceeded"


def require_room(request: Request, max_seq_len: int, what: str = "prompt") -> None:
    """Raises ContextLengthError unless `request`, whose tokens `what` names, fits a context."""
    num_tokens, count = len(request.tokens), request.max_new_tokens
    if num_tokens + count <= max_seq_len:
        return
    room = max_seq_len - num_tokens
    fix = f"lower max_new_tokens to {room} or shorten the prompt"
    # Gateways know these first words, and these last ones, and fall back to another model.
    raise ContextLengthError(
        f"This model's maximum context length is {max_seq_len} tokens (max_seq_len={max_seq_len}), "
        f"and a {what} of {num_tokens} tokens and max_new_tokens={count} are {num_tokens + count}: "
        f"{fix if room > 0 else 'the prompt is too long, shorten it'}"
    )


def check_request(request: Request, model: ModelConfig, eos_id: int) -> None:
    """Raises ValueError for what no engine of the model can decode."""
    vocab_size, longest = model.vocab_size, model.max_seq_len
    for name, ids in {
        "prompt": request.tokens,
        "stop_tokens": request.stop_tokens,
        "given": request.given,
        "logit_bias": request.sampling.logit_bias,
    }.items():
        if max(ids, default=0) >= vocab_size:
            raise ValueError(
                f"{name} has the id {max(ids)}, and the vocabulary ids 0 to {vocab_size - 1}: "
                "use the model's own tokenizer"
            )
    if request.constraint is not None and eos_id not in request.stop_tokens:
        raise ValueError(
            f"stop_tokens={list(request.stop_tokens)} is not allowed with a constraint: EOS "
            f"({eos_id}) must be among them"
        )
    require_room(request, longest)
