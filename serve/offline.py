"""Requests that an engine of this process decodes to their ends."""

import signal
import threading
import time
from collections.abc import Sequence

from tqdm import tqdm

from serve.completion import Completion, CompletionBuilder
from serve.engine.engine import Engine
from serve.request import Request


def run_requests(
    engine: Engine, requests: Sequence[Request], use_tqdm: bool = False, unit: str = "completion"
) -> list[Completion]:
    """Run requests to their ends, and return their completions, in their order.

    Raises UserError for one that is not allowed, and KeyboardInterrupt, with these requests
    aborted. The engine can be used again, unless one of its steps raised an exception.
    """
    builders: dict[int, CompletionBuilder] = {}
    unfinished: dict[int, Request] = {}
    began, num_tokens = time.perf_counter(), 0
    with HeldInterrupts() as interrupts:
        try:
            for request in requests:
                request_id = engine.add(request)
                builders[request_id] = CompletionBuilder()
                unfinished[request_id] = request
                interrupts.check()
            with tqdm(total=len(requests), disable=not use_tqdm, unit=unit) as bar:
                while unfinished:
                    outputs = engine.step()
                    interrupts.check()
                    for output in outputs:
                        if output.request_id not in unfinished:
                            continue  # aborted by an earlier call
                        builders[output.request_id].add(output)
                        num_tokens += len(output.new_token_ids)
                        if output.finish_reason is not None:
                            request = unfinished.pop(output.request_id)
                            if request.sampling.max_new_tokens == 0:
                                num_tokens += len(request.prompt_token_ids)
                            rate = num_tokens / (time.perf_counter() - began)
                            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                            bar.update()
        finally:
            for request_id in unfinished:
                engine.abort(request_id)
    return [builder.completion() for builder in builders.values()]


class HeldInterrupts:
    """Ctrl-C while the context is open, which would leave a step half done: it is held back until
    `check`. A second one raises KeyboardInterrupt at once. Outside of the main thread, and where
    the program handles SIGINT itself, nothing is held."""

    def __enter__(self) -> "HeldInterrupts":
        self._has_come = False
        is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._holds = is_usual and threading.current_thread() is threading.main_thread()
        if self._holds:
            signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(self, *_: object) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C has come."""
        if self._has_come:
            raise KeyboardInterrupt

    def _hold(self, *_: object) -> None:
        self.check()
        self._has_come = True
