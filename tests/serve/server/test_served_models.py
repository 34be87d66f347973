"""Several models of one server, chosen by the field `model`."""

import asyncio
import itertools
import json
import re
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from serve.config import EngineConfig
from serve.engine.stats import Stats
from serve.server.app import make_app
from serve.server.cli import config_from
from serve.server.config import ServerConfig, model_configs
from serve.server.exchange import Exchanges
from serve.server.operating.reload import ReloadInProgress
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.stream import Busy
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.service import make_service
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_model, load_tokenizer, save_model
from stu.tokenizer import make_tokenizer
from stu.tokenizers.alphabet import bytes_files
from tests import forked
from tests.serve.adapters.adapter_folders import write_adapter
from tests.serve.conftest import MAX_SEQ_LEN, make_model
from tests.serve.requests import decode, make_request
from tests.serve.server.batches.views import client_of, create, ended, make_row, results
from tests.serve.server_process import events, eventually, serving

BYTES_SEQ_LEN, NUM_TOKENS = 256, 200
TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
PATHS = {
    "completions": {"prompt": "def"},
    "chat/completions": {"messages": [{"role": "user", "content": "def"}]},
    "responses": {"input": "def"},
    "embeddings": {"input": "def"},
    "score": {"text_1": "def", "text_2": "def"},
}
"""Paths under /v1, and bodies that each accepts."""
SLOW_STEPS = """
import sys
if "serve.server.replicas.process" in sys.orig_argv:
    import time
    from serve.engine.engine import Engine
    step = Engine.step
    def slow_step(engine):
        time.sleep(0.01)
        return step(engine)
    Engine.step = slow_step
"""


@pytest.fixture(scope="module")
def other_directory(tmp_path_factory):
    """A model with another vocabulary, width, context and chat template."""
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer = make_tokenizer(bytes_files(), folder)
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=8,
        num_layers=2,
        num_filters=6,
        num_heads=2,
        window_tokens=5,
        max_seq_len=BYTES_SEQ_LEN,
    )
    save_model(folder / "model", FlashSTU(config), tokenizer, {"max_new_tokens": 5})
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return folder / "model"


@pytest.fixture(scope="module")
def first_directory(tmp_path_factory, code_tokenizer):
    """A model with room for `NUM_TOKENS`, named `model`."""
    folder = tmp_path_factory.mktemp("first") / "model"
    save_model(folder, make_model(code_tokenizer, BYTES_SEQ_LEN), code_tokenizer)
    return folder


def config_of(model_directory, models, **settings):
    engine = EngineConfig(cache_gib=0.01)
    return ServerConfig(model_directory, models=models, **{"engine": engine, **settings})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, code_tokenizer):
    folder = tmp_path_factory.mktemp("adapter") / "own"
    write_adapter(folder, make_model(code_tokenizer, MAX_SEQ_LEN))
    return folder


@pytest.fixture
def service(model_directory, other_directory, adapter):
    """A service of two models, with an adapter of the first, and no replicas."""
    models = f"other={other_directory}"
    return make_service(config_of(model_directory, models, lora_modules=f"tuned={adapter}"))


@pytest.fixture
def ask(service):
    """Call with a method, a path and a body: the answer of the service's application."""
    count = service.metrics.count_refused
    app = Exchanges(make_app(service), log_texts=False, count=count)

    async def answer(method, path, body):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://stu") as http:
            return await http.request(method, path, json=body)

    return lambda method, path, body=None: asyncio.run(answer(method, path, body))


@pytest.fixture
def submitted(service, monkeypatch):
    """Requests by the name of the model whose replicas got them, all of which are busy."""
    found = {model.name: [] for model in service.models}

    def submit(name, requests, *_):
        found[name] += requests
        raise Busy("full")

    for model in service.models:
        replicas = model.current.replicas
        monkeypatch.setattr(replicas, "submit", lambda *values, n=model.name: submit(n, *values))
    return found


def sample(service, name, **labels):
    return service.metrics._registry.get_sample_value(name, labels)


def replicas_that(is_healthy=True, num_loading=0):
    """Replicas that are in a state."""
    return SimpleNamespace(is_healthy=is_healthy, is_loading=False, num_loading=num_loading)


def test_models_are_listed_with_their_adapters_and_lengths(ask):
    data = ask("GET", "/v1/models").json()["data"]
    assert [(own["id"], own["parent"], own["max_model_len"]) for own in data] == [
        ("model", None, 64),
        ("tuned", "model", 64),
        ("other", None, BYTES_SEQ_LEN),
    ]
    assert ask("GET", "/v1/models/other").json()["max_model_len"] == BYTES_SEQ_LEN
    assert ask("GET", "/tokenizer_info").json()["vocab_size"] == 280
    assert ask("GET", "/tokenizer_info?model=other").json()["vocab_size"] < 280
    for name in (None, "tuned", "other"):
        body = {"model": name, "prompt": "def", "add_special_tokens": False}
        found = ask("POST", "/tokenize", body).json()
        assert (found["tokens"] == list(b"def")) == (name == "other")
        assert found["max_model_len"] == (BYTES_SEQ_LEN if name == "other" else 64)
        text = ask("POST", "/detokenize", {"model": name, "tokens": found["tokens"]}).json()
        assert text["prompt"] == "def"


@pytest.mark.parametrize("path", PATHS)
def test_a_request_goes_to_the_replicas_of_its_model(ask, service, submitted, path):
    names = {None: "model", "model": "model", "tuned": "model", "other": "other"}
    for name, base in names.items():
        assert ask("POST", f"/v1/{path}", {**PATHS[path], "model": name}).status_code == 429
        (first, *_) = submitted[base]
        assert [len(requests) > 0 for requests in submitted.values()] == [
            base == own for own in submitted
        ]
        assert first.adapter == ("tuned" if name == "tuned" else "")
        version = service.find(base).current
        text = version.tokenizer.decode(first.prompt_token_ids)
        if path not in ("chat/completions", "responses"):
            assert text == "def"
        elif base == "other":
            assert (text, first.sampling.max_new_tokens) == ("[def]", 5)
        else:
            assert (text, first.sampling.max_new_tokens) == ("user: def\n\nassistant:", 9)
        for requests in submitted.values():
            requests.clear()


def test_limits_are_those_of_the_model(ask, submitted):
    long = {"prompt": [1] * 100, "max_tokens": 1}
    refused = ask("POST", "/v1/completions", long)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert ask("POST", "/v1/completions", {**long, "model": "other"}).status_code == 429
    body = {"input": "x", "dimensions": 16}
    assert ask("POST", "/v1/embeddings", body).status_code == 429
    refused = ask("POST", "/v1/embeddings", {**body, "model": "other"})
    assert "8, the model's width" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", [*(f"/v1/{path}" for path in PATHS), "/tokenize", "/detokenize"])
def test_an_unknown_model_is_not_found(ask, service, path):
    body = PATHS.get(path.removeprefix("/v1/"), {"prompt": "x", "tokens": [1]})
    body = {name: body[name] for name in body if path != "/tokenize" or name == "prompt"}
    body = {name: body[name] for name in body if path != "/detokenize" or name == "tokens"}
    answer = ask("POST", path, {**body, "model": "third"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert 'one of "model", "tuned", "other"' in error["message"]
    assert sample(service, "stu:requests_refused_total", model_name="", status="404") == 1


def test_metrics_are_by_model(ask, service, submitted):
    for name in ("model", "tuned", "other"):
        ask("POST", "/v1/completions", {"prompt": "x", "model": name})
    refused = {
        name: sample(service, "stu:requests_refused_total", model_name=name, status="429")
        for name in ("model", "other")
    }
    assert refused == {"model": 2, "other": 1}
    families = list(text_string_to_metric_families(service.metrics.text().decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family is written twice"
    for family in families:
        if family.name in ("vllm:num_requests_waiting", "stu:replicas_ready"):
            assert [own.labels["model_name"] for own in family.samples] == ["model", "other"]
    service.models[1].metrics.prompt_tokens.inc(3)
    assert sample(service, "vllm:prompt_tokens_total", model_name="other") == 3
    assert sample(service, "vllm:prompt_tokens_total", model_name="model") == 0


def test_probes_tell_of_one_model_or_of_all(ask, service, monkeypatch):
    first, second = (model.replicas for model in service.models)
    for healthy in ((1, 1), (1, 0), (0, 1), (0, 0)):
        for replicas, is_healthy in zip((first, second), healthy, strict=True):
            monkeypatch.setattr(replicas, "current", replicas_that(is_healthy=bool(is_healthy)))
        for path, is_good in (("/health", any(healthy)), ("/ready", all(healthy))):
            assert ask("GET", path).status_code == (200 if is_good else 503)
            for name, is_healthy in zip(("model", "other"), healthy, strict=True):
                found = ask("GET", f"{path}?model={name}").status_code
                assert found == (200 if is_healthy else 503)
    for path in ("/health", "/ready"):  # which need no key
        answer = ask("GET", f"{path}?model=third")
        assert answer.status_code == 404
        assert not re.search("tuned|other", answer.text)


@pytest.mark.parametrize("num_ready", [0, 1, 2, 3])
def test_replicas_are_counted_beside_whether_a_model_can_serve(ask, service, num_ready, caplog):
    """One replica is enough to serve, and the counts tell that others are still to come."""
    other, replicas = service.models[1], Replicas(ReplicasConfig("", ("cpu",) * 3))
    other.replicas.add(replicas)
    other.switch(replace(other.current, replicas=replicas))
    for index in range(num_ready):
        replicas._replicas[index] = SimpleNamespace(
            is_ready=True, stats=Stats(*[0] * 10), last_heard=time.monotonic(), streams={}
        )
        replicas._has_been_ready = True
    assert replicas.num_loading == 3 - num_ready
    counts = {"replicas": 3, "replicas_ready": num_ready}
    for path in ("/health", "/ready"):
        caplog.clear()
        answer = ask("GET", f"{path}?model=other")
        assert answer.status_code == (200 if num_ready else 503)
        assert caplog.messages.count("refused with 503: loading the model") == (num_ready == 0)
        status = {"status": "ok" if num_ready else "loading the model"}
        assert answer.json() == status | counts
        # The other model has no replica yet: `/health` asks for one of any model.
        status = status if path == "/health" else {"status": "loading the model"}
        counts_of_both = {"replicas": 4, "replicas_ready": num_ready}
        assert ask("GET", path).json() == status | counts_of_both
    other, model = (ask("GET", f"/v1/models/{name}").json() for name in ("other", "tuned"))
    assert counts.items() <= other.items()
    assert {"replicas": 1, "replicas_ready": 0}.items() <= model.items()
    assert sample(service, "stu:replicas", model_name="other") == 3
    assert sample(service, "stu:replicas_ready", model_name="other") == num_ready
    replicas._failed_starts[2] = 1
    assert replicas.num_loading == max(0, 2 - num_ready), "one that fails is not waited for"


def test_reloads_name_a_model_and_come_one_after_the_other(service, monkeypatch):
    model, other = service.models

    async def reload(path, one_by_one):
        return {"version": 2}

    async def run():
        model.reloader.reload = reload
        monkeypatch.setattr(model.replicas, "current", replicas_that())
        for current in (other.replicas.current, replicas_that(num_loading=1)):
            monkeypatch.setattr(other.replicas, "current", current)
            with pytest.raises(ReloadInProgress, match="replicas of other are being loaded"):
                await service.reload("model", None, None)
            with pytest.raises(ReloadInProgress) if current.is_loading else nullcontext():
                # A version whose replicas end again and again can be exchanged.
                assert await service.reload("model", None, True) == {"model": "model", "version": 2}
        monkeypatch.setattr(other.replicas, "current", replicas_that())
        assert service.reloading("other")["path"] == str(other.config.model)
        other.reloader._state = "loading"
        with pytest.raises(Exception, match="another version is being loaded"):
            await service.reload("model", None, None)
        other.reloader._state = "finishing"
        other.reloader._is_one_by_one = True  # so the last replicas are still to come
        with pytest.raises(Exception, match="another version is being loaded"):
            await service.reload("model", None, None)
        other.reloader._is_one_by_one = False

        assert await service.reload(None, None, None) == {"model": "model", "version": 2}
        with pytest.raises(UserError, match="third"):
            await service.reload("third", None, None)

    asyncio.run(run())


def test_of_two_reloads_at_once_one_is_refused(service, monkeypatch, tmp_path):
    for model in service.models:
        monkeypatch.setattr(model.replicas, "current", replicas_that())

    async def run():
        calls = (service.reload(model.name, tmp_path, None) for model in service.models)
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second = asyncio.run(run())
    assert isinstance(first, UserError), "the first has looked into the folder"
    assert isinstance(second, ReloadInProgress)


def test_replicas_end_though_others_cannot(service, monkeypatch, caplog):
    stopped = []

    async def fail():
        raise OSError("no pipe")

    def stopping(name):
        async def stop():
            await asyncio.sleep(0)
            stopped.append(name)

        return stop

    model, other = service.models
    monkeypatch.setattr(model.replicas.current, "stop", fail)
    model.replicas.add(SimpleNamespace(stop=stopping("next version")))
    monkeypatch.setattr(other.replicas.current, "stop", stopping("other"))
    asyncio.run(service.stop())
    assert sorted(stopped) == ["next version", "other"]
    assert "replicas of model have not ended" in caplog.text
    assert "no pipe" in caplog.text


def test_settings_of_models(model_directory, other_directory):
    settings = {"model": str(model_directory), "cache_gib": 2.0, "devices": "cpu", "replicas": 2}
    own = {"model": str(other_directory), "replicas": 3, "cache_gib": 0.5, "devices": 0}
    for models in ({"small": own}, json.dumps({"small": own})):
        found = model_configs(config_from({**settings, "models": models}))
        assert list(found) == ["model", "small"]
        first, second = found.values()
        assert (first.name, first.replicas, first.engine.cache_gib) == ("model", 2, 2)
        assert (second.name, second.model) == ("small", other_directory)
        assert (second.replicas, second.engine.cache_gib, second.devices) == (3, 0.5, "0")
    found = model_configs(config_from({**settings, "models": f"a={other_directory}, b=x"}))
    assert [own.model.name for own in found.values()] == ["model", "model", "x"]
    assert found["b"].engine.cache_gib == 2


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("a", "NAME=PATH"),
        ("a=", "NAME=PATH"),
        ("a=x,a=y", "each NAME once"),
        ("model=x", "none that of the model"),
        ({"a": "x"}, "an object for each NAME"),
        ({7: {"model": "x"}}, "a text, in quotes"),
        ({"a": {"model": "x", "lora_modules": "tuned"}}, "a: lora_modules=.*NAME=PATH"),
        ({"a": {"devices": "cpu"}}, "which has its directory as model"),
        ({"a": {"model": "x", "port": 1}}, "a: port is not allowed: it must be one of model"),
        ({"a": {"model": "x", "replicas": 0}}, "a: replicas=0 .* >= 1"),
        ({"a": {"model": "x", "max_running": 0}}, "a: max_running=0"),
        ({"a": {"model": "x", "dtype": "float16"}}, "a: dtype=.*float32, bfloat16"),
        ({"a": {"model": ["x"]}}, "a: model=.*a text"),
        ({"a": {"model": "x", "lora_modules": "tuned=y"}}, "tuned is there twice"),
    ],
)
def test_settings_of_models_that_are_refused(model_directory, models, message):
    with pytest.raises(UserError, match=message) as error:
        model_configs(config_of(model_directory, models, lora_modules="tuned=x"))
    assert error.value.field == "models"


def test_engines_of_several_models_on_a_device_need_a_size(model_directory, other_directory):
    models = f"other={other_directory}"
    with pytest.raises(UserError, match="give cache_gib") as error:
        make_service(config_of(model_directory, models, engine=EngineConfig()))
    assert error.value.field == "cache_gib"
    sizes = {"other": {"model": str(other_directory), "cache_gib": 0.1}}
    with pytest.raises(UserError, match="give cache_gib"):
        make_service(config_of(model_directory, sizes, engine=EngineConfig()))
    sizes["other"]["cache_gib"] = None
    with pytest.raises(UserError, match=r"^models: other: several replicas on a device"):
        make_service(config_of(model_directory, sizes))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"devices": "gpu"}, '^models: other: devices="gpu"'),
        ({"tensor_parallel": 3}, "^models: other: tensor_parallel=3"),
        ({"lora_modules": "own=missing"}, "^models: other: missing/adapter_config.json: no such"),
        ({"model": "missing"}, "^models: other: missing/config.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_model_of_a_setting(model_directory, other_directory, own, message):
    own = {"model": str(other_directory), **own}
    with pytest.raises(UserError, match=message) as error:
        make_service(config_of(model_directory, {"other": own}, devices="cpu"))
    assert error.value.field == "models"


def test_errors_of_the_first_model_are_those_of_the_command(model_directory, other_directory):
    own = {"model": str(other_directory), "tensor_parallel": 1}
    config = config_of(model_directory, {"other": own}, devices="cpu", tensor_parallel=3)
    with pytest.raises(UserError, match=r"^tensor_parallel=3"):
        make_service(config)


def text_of(response):
    return "".join(event["choices"][0]["text"] for event in events(response))


@contextmanager
def begun(http, replica, model):
    """Begin a stream of `NUM_TOKENS` and stop its replica before the end; yield a function that
    returns the whole text."""
    body = {"prompt": "def f(", "seed": 3, "stop_at_eos": False, "stream": True}
    body |= {"model": model, "max_tokens": NUM_TOKENS}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        first = next(lines)
        replica.suspend()
        assert 0 < counts(http, "vllm:generation_tokens_total")[model] < NUM_TOKENS

        def rest():
            response.iter_lines = lambda: itertools.chain([first], lines)
            return text_of(response)

        yield rest


def expected(directory):
    """The text of a stream of `begun`."""
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    tokens = tokenizer.start_ids + tokenizer.encode("def f(")
    request = make_request(tokens, NUM_TOKENS, temperature=1.0, seed=3)
    (completion,) = decode(model, tokenizer, [request], batch_invariant=True)
    return completion.text


def replicas_of(server):
    """Processes of the replicas of the models `model` and `other`, which have one each."""
    text = "".join(server.lines)
    logged = re.findall(r"replica 0 of (\w+) on (?:cpu,?)+ takes requests: process (\d+)", text)
    processes = {name: forked.real(int(number)) for name, number in logged}
    return processes["model"], processes["other"]


def counts(http, name):
    """Values of a metric by model."""
    lines = re.findall(rf"^{name}{{(.*)}} (\S+)$", http.get("/metrics").text, re.M)
    found: dict[str, float] = {}
    for labels, value in lines:
        model = re.search('model_name="([^"]*)"', labels)[1]
        found[model] = found.get(model, 0) + float(value)
    return found


@pytest.fixture
def slow_steps(patched, monkeypatch):
    """Let steps of replicas take 10 ms at least, so that streams have not ended when they stop."""
    for name, value in patched(SLOW_STEPS).items():
        monkeypatch.setenv(name, value)


def test_a_model_goes_on_while_the_other_loses_its_replica(
    first_directory, other_directory, tmp_path, slow_steps
):
    options = "--models", f"other={other_directory}", "--batch-invariant"
    options += "--batch-dir", tmp_path / "batches", "--watchdog-seconds", 300
    texts = [expected(own) for own in (first_directory, other_directory)]
    with serving(first_directory, *options) as server, server.client() as http:
        replicas = replicas_of(server)
        with (
            begun(http, replicas[0], "model") as first,
            begun(http, replicas[1], "other") as second,
        ):
            replicas[1].kill()
            replicas[0].resume()
            assert first() == texts[0]
            assert second() == texts[1]
        assert counts(server, "stu:replica_restarts_total") == {"model": 0, "other": 1}
        assert counts(server, "stu:requests_resumed_total") == {"model": 0, "other": 1}
        num_tokens = dict.fromkeys(("model", "other"), NUM_TOKENS)
        assert counts(server, "vllm:generation_tokens_total") == num_tokens
        rows = [
            make_row(number, model=name) for number, name in enumerate(["model", "other", "x"] * 3)
        ]
        client = client_of(server)
        output, errors = results(client, ended(client, create(client, rows).id))
        models = {name: line["response"]["body"]["model"] for name, line in output.items()}
        assert models == {
            row["custom_id"]: row["body"]["model"] for row in rows if row["body"]["model"] != "x"
        }
        assert {line["response"]["status_code"] for line in errors.values()} == {404}
        assert counts(server, "stu:batch_rows_total") == {"model": 3, "other": 3, "": 3}
        assert server.stop() == 0


@pytest.mark.slow
def test_models_that_ranks_divide_are_served_together(first_directory, other_directory, slow_steps):
    """Two models with two ranks each, over gloo, beside one that is whole: each answers as one
    process does, and the end of a rank ends no stream, nor any rank of another model."""
    whole = {"model": str(other_directory), "tensor_parallel": 1}
    models = json.dumps({"other": {"model": str(other_directory)}, "whole": whole})
    options = "--models", models, "--devices", "cpu", "--tensor-parallel", 2
    options += "--batch-invariant", "--watchdog-seconds", 300
    texts = [expected(own) for own in (first_directory, other_directory)]
    with serving(first_directory, *options) as server, server.client() as http:
        replicas = replicas_of(server)
        ranks = [forked.real(child.pid) for own in replicas for child in own.children()]
        assert len(ranks) == 2
        with (
            begun(http, replicas[0], "model") as first,
            begun(http, replicas[1], "other") as second,
        ):
            ranks[1].kill()
            for replica in replicas:
                replica.resume()
            assert [first(), second()] == texts
        assert counts(server, "stu:replica_restarts_total") == {"model": 0, "other": 1, "whole": 0}
        body = {"prompt": "def f(", "temperature": 1, "seed": 3, "max_tokens": 20, "n": 2}
        answers = [
            http.post("/v1/completions", json={**body, "model": name}).json()["choices"]
            for name in ("other", "whole")
        ]
        assert answers[0] == answers[1]
        assert ranks[0].is_running()
        assert server.stop() == 0
    eventually(lambda: not any(rank.is_running() for rank in ranks))


@pytest.mark.slow
def test_a_model_is_loaded_again_while_the_other_streams(
    model_directory, other_directory, tmp_path, slow_steps
):
    keys = tmp_path / "keys"
    keys.write_text("sk-operator admin\n")
    options = "--models", f"other={other_directory}", "--batch-invariant", "--api-keys", keys
    text = expected(other_directory)
    with serving(model_directory, *options, "--watchdog-seconds", 300) as server:
        http = server.client(headers={"authorization": "Bearer sk-operator"})
        (_, replica) = replicas_of(server)
        with http, begun(http, replica, "other") as rest:
            answer = http.post("/admin/reload", json={"path": str(other_directory)})
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert (found["model"], found["version"]) == ("model", 2)
            eventually(lambda: http.get("/admin/reload").json()["state"] == "idle")
            assert http.get("/admin/reload?model=other").json()["version"] == 1
            replica.resume()
            assert rest() == text
            lengths = [own["max_model_len"] for own in http.get("/v1/models").json()["data"]]
            assert lengths == [BYTES_SEQ_LEN] * 2
