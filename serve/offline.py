"""Requests that an engine of this process decodes to their ends."""

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

    Raises UserError, with these requests aborted, for one that is not allowed.
    """
    builders: dict[int, CompletionBuilder] = {}
    unfinished: dict[int, Request] = {}
    began, num_tokens = time.perf_counter(), 0
    try:
        for request in requests:
            request_id = engine.add(request)
            builders[request_id] = CompletionBuilder()
            unfinished[request_id] = request
        with tqdm(total=len(requests), disable=not use_tqdm, unit=unit) as bar:
            while unfinished:
                for output in engine.step():
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
