"""Scores and continuations straight from a model: its logits for whole texts, one at a time."""

import torch

from serve.evaluation.text_model import TextModel, TextScore


class FormulaModel(TextModel):
    """A model that remembers nothing; it decodes greedily."""

    def __init__(self, model, tokenizer):
        self.tokenizer, self.max_length = tokenizer, model.config.max_seq_len
        self._model = model

    @torch.no_grad()
    def score(self, texts):
        return [self._score(list(text.tokens), text.first) for text in texts]

    @torch.no_grad()
    def generate(self, prompts):
        return [self._generate(prompt) for prompt in prompts]

    @torch.no_grad()
    def likeliest(self, tokens, count):
        """Return the most probable tokens after `tokens`, one after another."""
        found = []
        for _ in range(count):
            found.append(int(self._logprobs([*tokens, *found])[-1].argmax()))
        return found

    def _logprobs(self, tokens):
        return self._model(torch.tensor([tokens]))[0].double().log_softmax(-1)

    def _score(self, tokens, first):
        logprobs = self._logprobs(tokens)
        scored = range(first, len(tokens))
        return TextScore(
            sum(logprobs[place - 1, tokens[place]].item() for place in scored),
            sum(int(logprobs[place - 1].argmax()) == tokens[place] for place in scored),
            len(scored),
        )

    def _generate(self, prompt):
        assert prompt.temperature == 0
        new, text = [], ""
        for _ in range(prompt.max_new_tokens):
            new += self.likeliest([*prompt.tokens, *new], 1)
            if new[-1] == self.tokenizer.eos_id:
                break
            text = self.tokenizer.decode(new)
            places = [text.find(stop) for stop in prompt.stop if stop in text]
            if places:
                return text[: min(places)]
        return text
