"""Times and tokens of requests, in metrics under vLLM's names."""

import asyncio
import itertools
import time
from dataclasses import fields
from types import SimpleNamespace

import pytest

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.stats import Stats
from serve.server.exchange import Exchange
from serve.server.operating.metrics import Metrics
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.stream import Stream
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.streams import Answer
from tests.serve.requests import make_request

STATS = {**dict.fromkeys((field.name for field in fields(Stats)), 0), "flushes": {}}


def report(moment, *outputs, scheduled=(), **values):
    """A report of an engine at the end of a step."""
    return {
        "time": moment,
        "scheduled": scheduled,
        "outputs": outputs,
        "stats": STATS,
        **values,
    }


def test_times_of_a_request_are_those_of_its_engine(model_directory):
    """The reader takes the outputs later, which no time depends on but the latency."""
    replicas = Replicas(ReplicasConfig(model_directory))
    all_metrics = Metrics("vllm", ["m"])
    metrics = all_metrics.of_model("m", replicas)
    began = time.monotonic() - 100
    stream, unscheduled = Stream(7, make_request([1, 2, 3], 5)), Stream(8, make_request([1], 5))
    replica = SimpleNamespace(streams={7: stream, 8: unscheduled}, stats=None)
    answer = Answer(
        replicas=replicas,
        metrics=metrics,
        endpoint=SimpleNamespace(choices_per_prompt=lambda body: 1),
        body=None,
        streams=[stream, unscheduled],
        writers=[],
        frame={"model": "m"},
        num_prompt_tokens=4,
        timeout_seconds=1000,
        arrived=began,
        exchange=Exchange("own"),
    )

    def found(name):
        name = f"vllm:{name}"
        values = (
            all_metrics._registry.get_sample_value(f"{name}_{part}", {"model_name": "m"})
            for part in ("count", "sum")
        )
        return tuple(values)

    def output(*tokens, **values):
        return {"request_id": 7, "new_token_ids": tokens, "text": "", **values}

    async def run():
        hear = replicas._hear
        await hear(0, replica, report(began + 2.5, scheduled=[[7, began + 2]], step_tokens=2))
        # Before anything has been generated.
        assert found("request_queue_time_seconds") == (1, pytest.approx(2))
        await hear(0, replica, report(began + 3, scheduled=[[7, began + 2.75]]))  # preempted
        await hear(0, replica, report(began + 5, output(4), step_tokens=5))
        await hear(0, replica, report(began + 6))
        last = output(5, 6, finish_reason="length")
        await hear(0, replica, report(began + 9, last, step_tokens=2))
        unscheduled.outputs.put_nowait(RuntimeError("ended"))
        with pytest.raises(RuntimeError, match="ended"):
            async for _ in answer.outputs():
                pass

    asyncio.run(run())
    assert found("request_queue_time_seconds") == (1, pytest.approx(2))
    assert found("request_prefill_time_seconds") == (1, pytest.approx(3))
    assert found("request_decode_time_seconds") == (1, pytest.approx(4))
    assert found("request_inference_time_seconds") == (1, pytest.approx(7))
    assert found("request_generation_tokens") == (2, 3)
    assert found("iteration_tokens_total") == (3, 9)


@pytest.mark.parametrize("cache", ["state", "pages"])
def test_tokens_of_a_prompt_count_in_the_steps_that_prefill_them(code_model, code_tokenizer, cache):
    config = EngineConfig(cache_gib=0.01, prompt_tokens_per_step=8, convolution_cache=cache)
    engine = Engine(code_model, code_tokenizer, config)
    engine.add(make_request(list(range(1, 31)), 4))
    counts = [(0, 0)]
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        counts.append((stats.prompt_tokens, stats.new_tokens))
    assert counts[-1] == (30, 4)
    prompt_tokens = [after[0] - before[0] for before, after in itertools.pairwise(counts)]
    if cache == "state":
        assert prompt_tokens == [8, 8, 8, 6, 0, 0, 0]
    else:  # whole, layer by layer
        assert sorted(prompt_tokens)[-2:] == [0, 30]
