"""A model that clients name in their requests, with replicas and metrics of its own."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from serve.server.config import ServerConfig
from serve.server.model_version import ModelVersion, make_version
from serve.server.operating.metrics import Metrics
from serve.server.operating.reload import Reloader
from serve.server.replicas.dispatcher import Dispatcher
from serve.server.replicas.stream import Busy, Unavailable
from serve.server.replicas.versions import Versions


class ServedModel:
    """A served model. Its replicas are not started yet.

    Args:
        config: Settings of the model.
        metrics: Metrics of the server.
        num_threads: Threads that an engine computes with on a CPU.
        replicas: Replicas that another program runs. None: those of the settings.

    Raises UserError.
    """

    def __init__(
        self,
        config: ServerConfig,
        metrics: Metrics,
        num_threads: int = 1,
        replicas: Dispatcher | None = None,
    ) -> None:
        self.config, self._num_threads = config, num_threads
        self.adapters = list(config.adapters)
        """Names of its adapters."""
        self.current = make_version(config, config.model, 1, num_threads, replicas)
        """Version that takes new requests."""
        self.replicas = Versions(self.current.replicas)
        self.metrics = metrics.of_model(config.name, self.replicas)
        self.is_open = asyncio.Event()
        """Whether requests may enter. Otherwise they wait, as the only replica is exchanged."""
        self.is_open.set()
        self.reloader = Reloader(self)
        self._num_at_door = 0

    @property
    def name(self) -> str:
        """Name for clients."""
        return self.config.name

    @property
    def names(self) -> Sequence[str]:
        """Names that clients may give: of the model, then of its adapters."""
        return [self.name, *self.adapters]

    @asynccontextmanager
    async def entered(self, is_background: bool = False) -> AsyncIterator[ModelVersion]:
        """Return the version for a new request, which does not end before the block has.

        is_background: Whether the request takes no place of `--max-waiting` and has no time limit.

        Raises Busy or Unavailable.
        """
        if is_background:
            await self.is_open.wait()
        elif not self.is_open.is_set():
            await self._wait_at_door()
        version = self.current
        version.num_entering += 1
        try:
            yield version
        finally:
            version.num_entering -= 1

    async def _wait_at_door(self) -> None:
        if self._num_at_door >= self.config.max_waiting:
            raise Busy(f"{self._num_at_door} requests wait for another version: try again later")
        self._num_at_door += 1
        try:
            await asyncio.wait_for(self.is_open.wait(), self.config.request_timeout_seconds)
        except asyncio.TimeoutError as error:
            raise Unavailable("another version of the model is being loaded") from error
        finally:
            self._num_at_door -= 1

    def next_version(self, path: Path) -> ModelVersion:
        """Return another version, whose replicas are not started yet. Raises UserError."""
        return make_version(self.config, path, self.current.version + 1, self._num_threads)

    def switch(self, version: ModelVersion) -> None:
        """Let another version take all new requests."""
        self.current, self.replicas.current = version, version.replicas
        self.is_open.set()
