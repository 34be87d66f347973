"""What a model can be asked, whatever the engine."""

from serve.request import Request
from stu.config import ModelConfig


def check_request(request: Request, model: ModelConfig, eos_id: int) -> None:
    """Raises ValueError for what no engine of the model can decode."""
    vocab_size, longest = model.vocab_size, model.max_seq_len
    for name, ids in {
        "tokens": request.tokens,
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
    if len(request.tokens) + request.max_new_tokens > longest:
        raise ValueError(
            f"a prompt of {len(request.tokens)} tokens and max_new_tokens="
            f"{request.max_new_tokens} exceed the model's max_seq_len={longest}: shorten the "
            "prompt or lower max_new_tokens"
        )
