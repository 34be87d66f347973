"""Time the steps of vLLM's engine. vLLM's own Python runs this file, by path.

    python vllm_steps.py '{"model": FOLDER, "context": 512, "batch": 8, "new_tokens": 64, ...}'

prints figures as JSON. The engine runs in this process, so that its memory is the process's.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Measure once and print the figures."""
    settings = json.loads(sys.argv[1])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM

    torch.set_num_threads(settings["threads"])
    engine = LLM(settings["model"], **settings["engine"]).llm_engine
    batch, new_tokens = settings["batch"], settings["new_tokens"]
    for number in range(batch):  # the first calls allocate
        add(engine, f"first-{number}", [3] * 8, 4)
    while engine.has_unfinished_requests():
        engine.step()
    prompt = [10 + number % 1000 for number in range(settings["context"])]
    start = time.perf_counter()
    add(engine, "0", prompt, new_tokens + 1 + batch)
    step_until(engine, 1)
    prefill_seconds = time.perf_counter() - start
    for number in range(1, batch):  # the prompt is remembered
        add(engine, str(number), prompt, new_tokens + 1 + batch)
    step_until(engine, batch)
    start = time.perf_counter()
    for _ in range(new_tokens):
        engine.step()
    step_ms = 1e3 * (time.perf_counter() - start) / new_tokens
    print(json.dumps({"prefill_seconds": prefill_seconds, "step_ms": step_ms}))


def add(engine: Any, name: str, prompt: list[int], new_tokens: int) -> None:
    """Add a request, sampled at temperature 1."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def step_until(engine: Any, num_decoding: int) -> None:
    """Step until so many requests have a new token."""
    decoding: set[str] = set()
    while len(decoding) < num_decoding:
        decoding |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}


if __name__ == "__main__":
    main()
