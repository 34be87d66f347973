"""The order in which replicas of two versions start and end, with replicas that do nothing."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.config import EngineConfig
from serve.server.operating import room
from serve.server.operating.reload import Reloader, ReloadFailed, ReloadInProgress
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.supervisor import ReplicasConfig, Totals
from serve.server.replicas.versions import Versions
from stu.common.errors import UserError

pytestmark = pytest.mark.anyio


class FakeReplicas(Replicas):
    """Replicas that start when `starts` lets them, and have requests until `busy` is cleared."""

    num_restarts = num_resumed = num_waiting = 0
    config = None

    def __init__(self, log, name, count, model):
        self.log, self.name = log, name
        self.config = ReplicasConfig(model, ("cpu",) * count, engine=EngineConfig(cache_gib=0.01))
        self.ready, self.busy = set(), set()
        self.fails_at = None

    def __len__(self):
        return len(self.config.devices)

    @property
    def stats(self):
        return sorted(self.ready)

    def totals(self):
        return Totals(preemptions=1)

    async def start(self):
        for index in range(len(self)):
            self.start_replica(index)

    def start_replica(self, index):
        self.log.append(f"start {self.name}{index}")

    async def replica_ready(self, index):
        await asyncio.sleep(0)
        if index == self.fails_at:
            raise OSError("no replica could be started")
        self.ready.add(index)

    async def retire(self, index):
        self.log.append(f"retire {self.name}{index}")
        while index in self.busy:
            await asyncio.sleep(0)

    async def stop_replica(self, index):
        assert index not in self.busy
        self.log.append(f"stop {self.name}{index}")
        self.ready.discard(index)

    async def stop(self):
        self.log.append(f"stop {self.name}")
        self.ready.clear()


class FakeService:
    """A service with versions a, b, .."""

    def __init__(self, count, model):
        self.log, self.model = [], model
        self.current = self.version(1, count)
        self.current.replicas.ready = set(range(count))
        self.replicas = Versions(self.current.replicas)
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.fails_at = None

    def version(self, number, count):
        replicas = FakeReplicas(self.log, "_abcdef"[number], count, self.model)

        async def idle():
            while replicas.busy:
                await asyncio.sleep(0)

        return SimpleNamespace(path=self.model, version=number, replicas=replicas, idle=idle)

    def next_version(self, path):
        new = self.version(self.current.version + 1, len(self.current.replicas))
        new.replicas.fails_at = self.fails_at
        return new

    def switch(self, served):
        self.log.append("switch")
        self.current, self.replicas.current = served, served.replicas
        self.is_open.set()


async def turns(count=200):
    """Let other tasks run, and threads with them."""
    for _ in range(count):
        await asyncio.sleep(0.001)


async def until(holds):
    while not holds():
        await asyncio.sleep(0.001)


async def test_beside_old_replicas_end_after_their_last_request(model_directory):
    service = FakeService(2, model_directory)
    reloader, old = Reloader(service), service.current
    old.replicas.busy = {0, 1}
    found = await reloader.reload(None, False)
    assert (found["version"], found["replicas_ready"], found["state"]) == (2, 2, "finishing")
    assert service.log == ["start b0", "start b1", "switch"]
    assert service.replicas.totals().preemptions == 2
    with pytest.raises(ReloadInProgress):
        await reloader.reload(None, False)
    old.replicas.busy = set()
    await until(lambda: reloader.description()["state"] == "idle")
    assert service.log[3:] == ["stop a"]
    assert service.replicas.totals().preemptions == 2  # those of the old version are kept


async def test_one_by_one_half_of_the_replicas_run_at_each_moment(model_directory):
    service = FakeService(4, model_directory)
    old = service.current
    await Reloader(service).reload(None, True)
    await until(lambda: service.log[-1] == "stop a")
    assert service.log == [
        *("retire a0", "stop a0", "start b0", "retire a1", "stop a1", "start b1", "switch"),
        *("retire a2", "stop a2", "start b2", "stop a3", "start b3", "stop a"),
    ]
    assert not old.replicas.ready


async def test_requests_wait_while_the_only_replica_is_exchanged(model_directory):
    service = FakeService(1, model_directory)
    service.current.replicas.busy = {0}
    reloading = asyncio.create_task(Reloader(service).reload(None, True))
    await until(lambda: not service.is_open.is_set())
    assert service.log == []  # its requests end first
    service.current.replicas.busy = set()
    await reloading
    assert service.log[:3] == ["stop a0", "start b0", "switch"]
    assert service.is_open.is_set()


@pytest.mark.parametrize(
    ("count", "one_by_one", "fails_at", "log"),
    [
        (2, False, 1, ["start b0", "start b1", "stop b"]),
        (1, True, 0, ["stop a0", "start b0", "stop b", "start a0"]),
        (
            4,
            True,
            1,
            [
                *("retire a0", "stop a0", "start b0", "retire a1", "stop a1", "start b1"),
                *("stop b", "start a0", "start a1"),
            ],
        ),
    ],
)
async def test_the_old_version_goes_on_if_a_new_replica_does_not_start(
    model_directory, count, one_by_one, fails_at, log
):
    service = FakeService(count, model_directory)
    old, service.fails_at = service.current, fails_at
    reloader = Reloader(service)
    with pytest.raises(ReloadFailed, match="the reason, and version 1 goes on"):
        await reloader.reload(None, one_by_one)
    await turns(3)
    assert service.log == log
    assert service.current is old is not None
    assert service.replicas.current is old.replicas
    assert service.is_open.is_set()
    service.fails_at = None
    await reloader.reload(None, one_by_one)  # another attempt may work


async def test_a_folder_without_a_model_changes_nothing(model_directory, tmp_path):
    service = FakeService(1, model_directory)
    with pytest.raises(UserError, match="no such file"):
        await Reloader(service).reload(tmp_path, None)
    (tmp_path / "config.json").write_bytes((model_directory / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be read"):
        await Reloader(service).reload(tmp_path, None)
    with pytest.raises(UserError, match="cannot be read"):  # as without permission
        await Reloader(service).reload(tmp_path / ("x" * 5000), None)
    assert service.log == []


async def test_stopping_the_server_cancels_a_reload(model_directory):
    service = FakeService(1, model_directory)
    service.current.replicas.busy = {0}
    reloader = Reloader(service)
    reloading = asyncio.create_task(reloader.reload(None, True))
    await until(lambda: not service.is_open.is_set())
    await reloader.stop()
    with pytest.raises(asyncio.CancelledError):
        await reloading


def test_room_beside_is_what_caches_weights_and_processes_take(monkeypatch, model_directory):
    config = ReplicasConfig(
        model_directory, ("cpu", "cuda:0", "cuda:0"), engine=EngineConfig(cache_gib=2.0)
    )
    devices = [("cuda:0", SimpleNamespace(free_bytes=0)), ("cuda:0", SimpleNamespace(free_bytes=0))]
    running = SimpleNamespace(config=config, devices_of_running=lambda: devices)
    weights = room.weight_bytes(model_directory, "float32")
    size = (Path(model_directory) / "model.safetensors").stat().st_size
    assert 0 < size - weights < 20_000  # the header
    assert room.weight_bytes(model_directory, "bfloat16") * 2 == weights
    own = 2 * room.GIB + 2 * weights + room.GIB
    memory = SimpleNamespace(available=own)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory)
    for free, fits in ((2 * own - 1, False), (2 * own, True)):
        for _, replica in devices:
            replica.free_bytes = free
        assert room.fits_beside(running, model_directory) == fits
    memory.available = own - 1
    assert not room.fits_beside(running, model_directory)
    # The ranks that divide a model have caches of their own.
    running.config = ReplicasConfig(model_directory, ("cpu,cpu",), engine=config.engine)
    for free, fits in ((2 * own - 1, False), (2 * own, True)):
        memory.available = free
        assert room.fits_beside(running, model_directory) == fits
    running.config = ReplicasConfig(model_directory, ("cuda:0,cuda:1",), engine=config.engine)
    # Only the first rank of a group reports its memory.
    devices[:] = [("cuda:0,cuda:1", SimpleNamespace(free_bytes=own))]
    assert not room.fits_beside(running, model_directory)
    devices.append(("cuda:1,cuda:0", SimpleNamespace(free_bytes=own)))
    assert room.fits_beside(running, model_directory)
    running.config = ReplicasConfig(model_directory)  # each takes half of what it finds
    memory.available = 10**15
    assert not room.fits_beside(running, model_directory)
