"""What a request's biases and penalties know of its tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class TokenHistory:
    """Dense over the vocabulary, so that the rows of a batch are adjusted together."""

    def __init__(
        self,
        vocab_size: int,
        prompt: Sequence[int],
        logit_bias: Mapping[int, float],
        device: str | torch.device = "cpu",
    ) -> None:
        self.bias: Tensor = torch.zeros(vocab_size, device=device)
        """Added to the logits, float32."""
        self.in_prompt: Tensor = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.new_counts: Tensor = torch.zeros(vocab_size, device=device)
        """How often each token is in the new text, float32."""
        if logit_bias:
            ids = torch.tensor(list(logit_bias), device=device)
            self.bias[ids] = torch.tensor(list(map(float, logit_bias.values())), device=device)
        self.in_prompt[torch.tensor(prompt, device=device)] = True

    def append(self, token: int) -> None:
        """`token` is the next of the new text."""
        self.new_counts[token] += 1
