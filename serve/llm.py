"""Decoding, scores and embeddings from Python, for lists of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from serve.adapters.names import LoraRequest, adapter_folders, requested_adapters
from serve.completion import Completion, answered, normalized
from serve.config import EngineConfig
from serve.devices import device_groups
from serve.offline import run_requests
from serve.parallel.loading import make_engine
from serve.prompts import choices, default_params, encode_prompt
from serve.request import Pooling, Request, are_token_ids
from serve.sampling_params import SamplingParams
from serve.scores import Score, Scoring
from stu.common.errors import UserError, requires_extra
from stu.model_dir import load_tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class RequestOutput:
    """Completions of one prompt."""

    prompt: str | None
    """Text of the prompt; None for a prompt of token ids."""
    prompt_token_ids: Sequence[int]
    """Token ids of the prompt, with BOS."""
    outputs: Sequence[Completion]
    """The `n` completions; with `best_of`, the `n` most probable ones, best first."""


@dataclass(frozen=True)
class EmbeddingOutput:
    """Embedding of one prompt."""

    prompt: str | None
    """Text of the prompt; None for a prompt of token ids."""
    prompt_token_ids: Sequence[int]
    """Token ids of the prompt, with BOS."""
    embedding: Sequence[float]
    """One number per channel: `width` numbers."""


class LLM:
    """A model that decodes, scores and embeds lists of prompts, on one device or, with tensor
    parallelism, several.

    Args:
        model: Model directory, as `stu-export` writes it.
        device: Device, such as `cpu`, `cuda`, `cuda:1` or `1`. None: the first CUDA device, or the
            CPU without any.
        dtype: Dtype of the weights.
        tensor_parallel: Number of devices to divide the model among, each with a part of the
            weights and of the caches. `device` may list them, separated by commas; `cpu` stands for
            all of them. All but the first are used by other processes, which `close` ends.
        lora_modules: Folders of LoRA adapters in peft's layout, by the names that `lora_request`
            takes. Not supported with `tensor_parallel` above 1.
        engine: Fields of `serve.config.EngineConfig`, such as `cache_gib` and `max_running`.

    Raises UserError for files and settings that cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        tensor_parallel: int = 1,
        lora_modules: Mapping[str, str | Path] | None = None,
        **engine: Any,
    ) -> None:
        self._adapters = adapter_folders(lora_modules, tensor_parallel)
        self._path, self.tokenizer = Path(model), load_tokenizer(model)
        self.default_sampling_params = default_params(model, self.tokenizer)
        """Settings of the model directory's `generation.json`."""
        self._num_ranks = tensor_parallel
        config = EngineConfig(**engine)
        devices, *others = device_groups(
            "auto" if device in (None, "") else str(device), tensor_parallel, "device"
        )
        if others:
            count = "one device" if tensor_parallel == 1 else f"{tensor_parallel} devices"
            fix = "tensor_parallel divides a model among several devices, and cpu stands for all"
            raise UserError("device", device, count, fix)
        self._engine = make_engine(
            model, devices, dtype, self.tokenizer, config, False, self._adapters
        )

    def close(self) -> None:
        """End the other processes of `tensor_parallel`, which otherwise end with this process. No
        other method may be called afterwards."""
        if self._num_ranks > 1:
            from serve.parallel.engine import GroupEngine  # which needs msgpack

            assert isinstance(self._engine, GroupEngine)
            self._engine.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        lora_request: LoraRequest = None,
    ) -> list[RequestOutput]:
        """Return the completions of `prompts`, in their order.

        Args:
            prompts: A prompt or a list of prompts. BOS is put before texts; token ids are used as
                they are.
            sampling_params: Settings for all prompts, or a list with settings for each prompt.
                None: `default_sampling_params`. Prompts that share settings get different seeds,
                derived from the seed of the settings.
            use_tqdm: Whether to show a progress bar.
            priority: A number for each prompt; lower ones run first. None: 0 for all.
            lora_request: Name of an adapter of `lora_modules` for all prompts, or a list with a
                name or None for each prompt. None: the base model.

        Raises UserError, before anything is decoded, if a prompt or setting is not allowed. A
        completion that fails later has the `finish_reason` "error".
        """
        listed = _listed(prompts)
        shared = self.default_sampling_params if sampling_params is None else sampling_params
        params = [shared] * len(listed) if isinstance(shared, SamplingParams) else list(shared)
        priorities = [0] * len(listed) if priority is None else list(priority)
        for name, values in (("sampling_params", params), ("priority", priorities)):
            if len(values) != len(listed):
                message = f"{len(values)} {name} for {len(listed)} prompts: give one for each"
                raise UserError(name, message=message)
        adapters = requested_adapters(lora_request, len(listed), self._adapters)
        requests = [
            Request(encode_prompt(self.tokenizer, prompt), own, number, adapter=adapter)
            for prompt, own, number, adapter in zip(
                listed, params, priorities, adapters, strict=True
            )
        ]
        if not requests:
            return []
        if isinstance(shared, SamplingParams):
            single = choices(requests)
        else:
            single = [choice for request in requests for choice in choices([request])]
        completions = iter(run_requests(self._engine, single, use_tqdm))
        return [
            RequestOutput(
                prompt if isinstance(prompt, str) else None,
                request.prompt_token_ids,
                answered(
                    [next(completions) for _ in range(request.sampling.num_candidates)],
                    request.sampling,
                ),
            )
            for prompt, request in zip(listed, requests, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoraRequest = None,
    ) -> list[RequestOutput]:
        """Return the answers to one conversation, or to a list of conversations.

        Args:
            messages: Messages with a `role` and a `content`, or a list of such lists. The chat
                template of the model directory turns them into prompts.
            sampling_params: As for `generate`.
            use_tqdm: As for `generate`.
            lora_request: As for `generate`, with a name for each conversation.

        Raises UserError as `generate` does, and if jinja2, which the extra `serve` installs, is
        missing.
        """
        with requires_extra("serve"):  # jinja2
            from stu.chat.template import ChatTemplate

        template = ChatTemplate(self._path, self.tokenizer)
        is_single = all(isinstance(message, Mapping) for message in messages)
        chats: list[Any] = [messages] if is_single else list(messages)
        prompts = [template.tokens(chat) for chat in chats]
        return self.generate(prompts, sampling_params, use_tqdm, lora_request=lora_request)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: Prompt | Sequence[Prompt] | None = None,
        use_tqdm: bool = True,
        lora_request: LoraRequest = None,
    ) -> list[Score]:
        """Return the log probability of each prompt, or of each completion after its prompt.

        Args:
            prompts: As for `generate`. A prompt is scored without its first token, which for text
                is BOS.
            completions: A text or a list of token ids for each prompt. None: the prompts themselves
                are scored.
            use_tqdm: As for `generate`.
            lora_request: As for `generate`.

        Raises UserError if a prompt or completion is not allowed, or if a log probability is not
        finite.
        """
        listed = _listed(prompts)
        after = [None] * len(listed) if completions is None else _listed(completions)
        if len(after) != len(listed):
            raise UserError(
                "completions",
                message=f"{len(after)} completions for {len(listed)} prompts: give one for each",
            )
        if completions is not None and None in after:
            raise UserError("completions", None, "a text or a list of token ids for each prompt")
        scorings = [
            Scoring(self.tokenizer, prompt, completion)
            for prompt, completion in zip(listed, after, strict=True)
        ]
        requests = [scoring.request for scoring in scorings]
        answers = self._compute(requests, use_tqdm, lora_request)
        return [scoring.score(answer) for scoring, answer in zip(scorings, answers, strict=True)]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling = "mean",
        normalize: bool = True,
        use_tqdm: bool = True,
        lora_request: LoraRequest = None,
    ) -> list[EmbeddingOutput]:
        """Return an embedding of each prompt, from the hidden states after the final norm.

        Args:
            prompts: As for `generate`.
            pooling: `"mean"`, the mean over all positions, BOS included, or `"last"`, the hidden
                state of the last token.
            normalize: Whether to scale embeddings to length 1.
            use_tqdm: As for `generate`.
            lora_request: As for `generate`.

        Raises UserError if a prompt or the pooling is not allowed, or if a hidden state is not
        finite.
        """
        if pooling is None:
            raise UserError("pooling", None, "mean or last")
        listed = _listed(prompts)
        requests = [
            Request(
                encode_prompt(self.tokenizer, prompt),
                SamplingParams(max_new_tokens=0),
                pooling=pooling,
            )
            for prompt in listed
        ]
        answers = self._compute(requests, use_tqdm, lora_request)
        return [
            EmbeddingOutput(
                prompt if isinstance(prompt, str) else None,
                request.prompt_token_ids,
                normalized(answer.embedding) if normalize else answer.embedding,
            )
            for prompt, request, answer in zip(listed, requests, answers, strict=True)
        ]

    def _compute(
        self, requests: Sequence[Request], use_tqdm: bool, lora_request: LoraRequest
    ) -> list[Completion]:
        """Run requests that generate nothing. Raises UserError if one of them fails."""
        adapters = requested_adapters(lora_request, len(requests), self._adapters)
        requests = [
            replace(request, adapter=adapter)
            for request, adapter in zip(requests, adapters, strict=True)
        ]
        answers = run_requests(self._engine, requests, use_tqdm, "prompt")
        for answer in answers:
            if answer.error:
                raise UserError("model", message=answer.error)
        return answers


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """Return a list of prompts, given one or several."""
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and are_token_ids(prompts))
    return [prompts] if is_single else list(prompts)
