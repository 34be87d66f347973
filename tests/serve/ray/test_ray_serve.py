"""`stu-serve --ray`, and the application of Ray Serve."""

import asyncio
import json
import random
import socket
from contextlib import nullcontext

import httpx
import pytest

from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from tests.serve.conftest import LONG_SEQ_LEN, make_model
from tests.serve.ray.conftest import OBJECT_STORE_BYTES, ray_cluster
from tests.serve.requests import decode, make_request
from tests.serve.server_process import events, eventually, serving

pytestmark = pytest.mark.slow
SECONDS, NUM_STREAMS = 500, 300
POISON = [1, 66, 67, 68]
BODY = {"max_tokens": 5, "temperature": 0, "stop_at_eos": False}
FAULT = f"""
import os, sys
if "serve.server.replicas.process" in sys.orig_argv:
    from serve import wire
    read = wire.request_from_wire
    def request_from_wire(values):
        if list(values["prompt_token_ids"]) == {POISON}:
            os._exit(7)
        return read(values)
    wire.request_from_wire = request_from_wire
"""
"""A prompt that ends its engine, and not the actor of Ray that has it."""


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Ray takes minutes to start replicas on a busy machine."""
    monkeypatch.setattr("tests.serve.server_process.SECONDS", SECONDS)


def prompts():
    generator = random.Random(0)
    return [[1, *(generator.randrange(100, 250) for _ in range(9))] for _ in range(NUM_STREAMS)]


async def streamed(client, prompt, seed, count, begun):
    """Return the text of a stream; `begun` has the seeds of those that have a token."""
    body = {"prompt": prompt, "max_tokens": count, "seed": seed, "stop_at_eos": False}
    text, reason = "", None
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text, reason
            if line:
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text, reason = text + choice["text"], choice["finish_reason"]
                begun.add(seed)
    raise AssertionError("the stream ended without [DONE]")


async def all_streamed(url, count, interrupt):
    """Return all texts; call `interrupt` once a tenth of the streams have begun."""
    begun: set[int] = set()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
        tasks = [
            asyncio.create_task(streamed(client, prompt, seed, count, begun))
            for seed, prompt in enumerate(prompts())
        ]
        while len(begun) < NUM_STREAMS // 10:
            await asyncio.sleep(0.05)
        interrupt()  # Ray starts nodes in the main thread only
        return await asyncio.gather(*tasks)


def test_streams_go_on_when_a_host_is_killed_and_another_one_comes(
    long_model_directory, code_tokenizer
):
    count = 60
    with ray_cluster(num_cpus=1) as cluster:
        node = cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)

        def interrupt():
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)

        options = "--ray", "--replicas", 2, "--batch-invariant", "--max-waiting", 1000
        with serving(long_model_directory, *options) as server:
            eventually(lambda: server.metric("stu:replicas_ready") == 2, SECONDS)
            found = asyncio.run(all_streamed(server.url, count, interrupt))
            assert server.metric("stu:requests_resumed_total") > 0
            eventually(lambda: server.metric("stu:replicas_ready") == 2, SECONDS)
            eventually(lambda: server.metric("vllm:num_requests_running") == 0, SECONDS)
            print(f"{server.metric('stu:requests_resumed_total'):.0f} requests were resumed")
            assert server.stop() == 0
    sampling = SamplingParams(temperature=1.0)
    requests = [
        make_request(prompt, count, sampling, seed=seed) for seed, prompt in enumerate(prompts())
    ]
    model = make_model(code_tokenizer, LONG_SEQ_LEN)
    expected = decode(model, code_tokenizer, requests, batch_invariant=True)
    assert found == [(completion.text, "length") for completion in expected]


def test_replicas_are_added_while_requests_queue_and_ended_again(long_model_directory):
    options = "--ray", "--replicas", 1, "--max-replicas", 2, "--max-running", 2
    delays = "--scale-up-seconds", 1, "--scale-down-seconds", 2
    with ray_cluster(num_cpus=2), serving(long_model_directory, *options, *delays) as server:
        assert server.metric("stu:replicas_ready") == 1

        async def load():
            client = httpx.AsyncClient(base_url=server.url, timeout=SECONDS)
            begun: set[int] = set()
            tasks = [
                asyncio.create_task(streamed(client, [1, 100], seed, 4000, begun))
                for seed in range(12)
            ]
            async with client:
                while (await asyncio.to_thread(server.metric, "stu:replicas_ready")) < 2:
                    await asyncio.sleep(0.2)
                for task in tasks[:8]:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                return [task.result() for task in tasks[8:]]

        assert {reason for _, reason in asyncio.run(load())} == {"length"}
        eventually(lambda: server.metric("stu:replicas_ready") == 1, SECONDS)
        assert server.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert server.stop() == 0


def test_a_request_that_ends_its_engines_is_given_up_after_six(
    model_directory, patched, monkeypatch
):
    for name, value in patched(FAULT).items():
        monkeypatch.setenv(name, value)
    with ray_cluster(num_cpus=1), serving(model_directory, "--ray") as server:
        answer = server.post("/v1/completions", json={"prompt": POISON})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "replicas_ended"
        assert "6 replicas ended during this request" in answer.json()["error"]["message"]
        # Ray Serve may replace the actor meanwhile, which then does not report its last engines.
        assert server.metric("stu:replica_restarts_total") <= 6
        assert server.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert server.stop() == 0


def test_each_of_several_models_is_an_application(model_directory, long_model_directory):
    models = "--models", f"long={long_model_directory}", "--batch-invariant"
    bodies = [{**BODY, "prompt": [1, 66, 67], "model": name} for name in ("model", "long")]
    texts = []
    for options, cluster in (
        (models, nullcontext()),
        ((*models, "--ray"), ray_cluster(num_cpus=2)),
    ):
        with cluster, serving(model_directory, *options) as server:
            answers = [server.post("/v1/completions", json=body).json() for body in bodies]
            texts.append([answer["choices"][0]["text"] for answer in answers])
            lengths = [own["max_model_len"] for own in server.get("/v1/models").json()["data"]]
            assert lengths == [64, LONG_SEQ_LEN]
            assert server.metric("stu:replicas_ready") == 2
            assert server.stop() == 0
    assert texts[0] == texts[1]


def test_the_application_answers_behind_the_proxies_of_ray_serve(
    model_directory, long_model_directory, monkeypatch
):
    monkeypatch.setenv("STU_API_KEYS", "a-key")
    with ray_cluster(num_cpus=4):
        import ray
        from ray import serve

        from serve.ray_application import build

        with pytest.raises(UserError, match="did you mean 'replicas'"):
            build({"model": str(model_directory), "replica": 1})
        with pytest.raises(UserError, match="http_options"):
            build({"model": str(model_directory), "port": 1})
        ray.init(address="auto", log_to_driver=False)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        models = f"long={long_model_directory}"
        serve.run(build({"model": str(model_directory), "models": models, "cache_gib": "0.01"}))
        headers = {"authorization": "Bearer a-key"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
            assert client.get("/v1/models").status_code == 401
            eventually(lambda: client.get("/ready").status_code == 200, SECONDS)
            body = {**BODY, "prompt": "x"}
            long = {**body, "model": "long", "max_tokens": 100}
            answer = client.post("/v1/completions", json=long, headers=headers).json()
            assert (answer["model"], answer["usage"]["completion_tokens"]) == ("long", 100)
            answer = client.post("/v1/completions", json=body, headers=headers).json()
            assert answer["usage"]["completion_tokens"] == 5
            streamed_body = {**body, "stream": True}
            with client.stream(
                "POST", "/v1/completions", json=streamed_body, headers=headers
            ) as response:
                pieces = events(response)
            text = "".join(piece["choices"][0]["text"] for piece in pieces)
            assert text == answer["choices"][0]["text"]
            assert "vllm:generation_tokens_total" in client.get("/metrics", headers=headers).text
        serve.shutdown()
