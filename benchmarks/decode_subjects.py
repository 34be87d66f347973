"""What `python -m benchmarks decode` times: the engine with one of our caches, or a peer."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.decode_engine import cache_flushes, make_engine, seek, skip_prompts
from benchmarks.lockstep_cache import LockstepCache
from benchmarks.peers import Peer
from benchmarks.rates import synchronize
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.model import FlashSTU

PEER_PROMPT_TOKENS = 8
"""Really taken in, before the cache is set to where a run would be."""


class Subject(Protocol):
    """Something that decodes a batch in step."""

    warm_up_steps: int

    def step(self) -> dict[str, float]:
        """Decode a token of each sequence; milliseconds of it and of its parts."""

    def seek(self, position: int) -> None:
        """Go on as if so many new tokens had been decoded."""

    def prepare_flushes(self) -> None:
        """Make what the first flush of each size makes for those after it."""

    def flushes(self) -> list[tuple[str, int, int]]:
        """What some steps do besides, a position at which each occurs, and how many of a run's
        steps it stands for."""


class EngineSubject:
    """The engine; parts of a step are `convolution`, the time in the cache's `step` and `advance`,
    and `outside`, what is spent outside the runner: scheduler, sampling, text. On a GPU there is
    the first alone: on its own time line, gaps in which it waits for more among it."""

    def __init__(
        self,
        model: FlashSTU,
        cache_name: str,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        page_len: int,
        whole: bool,
    ) -> None:
        self.engine, self._cache = make_engine(
            model, cache_name, batch, prompt_tokens, new_tokens, page_len
        )
        self._batch, self._prompt_tokens, self._new_tokens = batch, prompt_tokens, new_tokens
        # In the first page the views are made that steps in later ones use again.
        self.warm_up_steps = min(page_len, new_tokens // 8) if cache_name == "paged" else 1
        if not whole:
            skip_prompts(self.engine, self._cache, prompt_tokens)
        params = SamplingParams(max_new_tokens=new_tokens, stop_at_eos=False)
        for seed in range(batch):
            self.engine.add(Request([seed + 1] * prompt_tokens, params))
        while self.engine.stats().new_tokens < batch:
            self.engine.step()
        assert self.engine.stats().running == batch, "the caches have too little room"
        device = model.embedding.weight.device.type
        self._on_gpu = device == "cuda"
        self._spent = {"convolution": 0.0, "runner": 0.0}
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for method in ("step", "advance"):
            call = getattr(self._cache, method)
            timed_call = self._gpu_timed(call) if self._on_gpu else self._timed(call, "convolution")
            setattr(self._cache, method, timed_call)
        self.engine._runner.decode = self._timed(self.engine._runner.decode, "runner")  # type: ignore[method-assign]

    def step(self) -> dict[str, float]:
        assert len(self.engine._scheduler.running) == self._batch, "the run is at its end"
        self._spent.update(convolution=0.0, runner=0.0)
        self._events.clear()
        figures = timed(self.engine.step)
        if self._on_gpu:
            return figures | {
                "convolution": sum(its.elapsed_time(end) for its, end in self._events)
            }
        return figures | {
            "convolution": 1e3 * self._spent["convolution"],
            "outside": figures["step"] - 1e3 * self._spent["runner"],
        }

    def seek(self, position: int) -> None:
        seek(self.engine, self._cache, self._prompt_tokens, position)

    def prepare_flushes(self) -> None:
        if isinstance(self._cache, LockstepCache) and not self._on_gpu:
            self._cache.prepare_flushes()  # or a run takes twice as long; nothing else is made
            return
        for _, position, _ in self.flushes():
            self.seek(position - 1)
            self.step()

    def flushes(self) -> list[tuple[str, int, int]]:
        return cache_flushes(self._cache, self._new_tokens)

    def _timed(self, call: Any, part: str) -> Any:
        def timed_call(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            self._spent[part] += time.perf_counter() - start
            return result

        return timed_call

    def _gpu_timed(self, call: Any) -> Any:
        def timed_call(*args: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call(*args)
            end.record()
            self._events.append((start, end))
            return result

        return timed_call


class PeerSubject:
    """A peer, decoded greedily."""

    warm_up_steps = 1

    @torch.inference_mode()
    def __init__(
        self, peer: Peer, batch: int, prompt_tokens: int, new_tokens: int, device: str
    ) -> None:
        self._peer, self._prompt_tokens = peer, prompt_tokens
        self._device = torch.device(device)
        with self._device:
            peer.start(batch, prompt_tokens + new_tokens)
            prompts = torch.arange(batch)[:, None].expand(-1, PEER_PROMPT_TOKENS)
            self._tokens = peer.prefill(prompts).argmax(-1)

    @torch.inference_mode()
    def step(self) -> dict[str, float]:
        def decode() -> None:
            self._tokens = self._peer.step(self._tokens).argmax(-1)

        return timed(decode)

    @torch.inference_mode()
    def seek(self, position: int) -> None:
        with self._device:
            self._peer.seek(self._prompt_tokens + position)

    def prepare_flushes(self) -> None:
        """There are none."""

    def flushes(self) -> list[tuple[str, int, int]]:
        return []


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a call."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return {"step": 1e3 * (time.perf_counter() - start)}
