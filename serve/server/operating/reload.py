"""Loading another version of the model while requests are decoded.

New replicas start beside the old ones, and take all new requests once they are ready; the old ones
end after their last request. Where memory has no room for both, replicas are exchanged one by one:
one takes no more requests, ends after those that it has, and a new one starts in its place; the new
version takes new requests once it has half of the replicas. Where there is only one replica, new
requests wait meanwhile.

If a new replica does not start, the old version goes on as before.
"""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from serve.server.operating.room import fits_beside, weight_bytes
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.dispatcher import Dispatcher
from serve.server.replicas.stream import EngineError
from serve.server.replicas.versions import Versions
from stu.common.errors import UserError
from stu.common.text import Json
from stu.model_dir import load_config

logger = logging.getLogger("stu")

State = Literal["idle", "loading", "finishing"]


class Version(Protocol):
    """A version of the served model."""

    path: Path
    version: int
    replicas: Dispatcher

    async def idle(self) -> None:
        """Wait until no request is left."""


AnyVersion = TypeVar("AnyVersion", bound=Version)


class Model(Protocol[AnyVersion]):
    """A served model that can be exchanged."""

    current: AnyVersion
    """Version that takes new requests."""
    replicas: Versions
    is_open: asyncio.Event
    """Whether new requests may enter; otherwise they wait."""

    def next_version(self, path: Path) -> AnyVersion:
        """Return another version, whose replicas are not started yet. Raises UserError."""

    def switch(self, served: AnyVersion) -> None:
        """Let another version take all new requests."""


class ReloadInProgress(Exception):
    """Another version is being loaded."""


class ReloadFailed(EngineError):
    """A replica of the new version did not start, and the old version goes on."""


class Reloader(Generic[AnyVersion]):
    """Exchanges the version of a served model."""

    def __init__(self, model: Model[AnyVersion]) -> None:
        self._model = model
        self._task: asyncio.Task[None] | None = None
        self._state: State = "idle"
        """finishing: the new version takes all new requests, and the old one has some left."""
        self._is_one_by_one = False

    @property
    def is_loading(self) -> bool:
        """Whether replicas of a version are still loaded: until it takes requests, or where they
        are exchanged one by one, until the last one is."""
        return self._state == "loading" or (self._state == "finishing" and self._is_one_by_one)

    async def reload(self, path: Path | None, one_by_one: bool | None) -> Json:
        """Load a version, and return once it takes all new requests. It is loaded even if the
        caller is cancelled.

        Args:
            path: Model directory. None: that of the current version, which may have changed.
            one_by_one: Whether to exchange replicas one by one. None: if there is no room for both
                versions.

        Raises:
            UserError: The directory has no model that can be served.
            ReloadInProgress: Another one is being loaded, or finished.
            ReloadFailed: The old version goes on.
        """
        if self._task is not None and not self._task.done():
            raise ReloadInProgress("another version is being loaded: wait until it is done")
        began = time.monotonic()
        switched: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        switched.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._state = "loading"
        self._task = asyncio.create_task(self._reload(path, one_by_one, switched))
        await asyncio.shield(switched)
        return {**self.description(), "seconds": round(time.monotonic() - began, 3)}

    def description(self) -> Json:
        """Return the version that takes new requests, and how far a reload is."""
        served = self._model.current
        return {
            "path": str(served.path),
            "version": served.version,
            "replicas_ready": len(served.replicas.stats),
            "state": self._state,
            "one_by_one": self._is_one_by_one,
        }

    async def stop(self) -> None:
        """Cancel what is in progress, as the server stops."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _reload(
        self, path: Path | None, one_by_one: bool | None, switched: "asyncio.Future[None]"
    ) -> None:
        model, old = self._model, self._model.current
        try:
            new, self._is_one_by_one = await asyncio.to_thread(
                self._next_version, path or old.path, one_by_one
            )
            logger.info("version %d is loaded from %s", new.version, new.path)
            model.replicas.add(new.replicas)
            exchange = self._exchange_one_by_one if self._is_one_by_one else self._exchange_beside
            await exchange(old, new, switched)
            await model.replicas.end(old.replicas)
            logger.info("version %d has replaced version %d", new.version, old.version)
        except Exception as error:
            if not switched.done():
                switched.set_exception(self._failure(error, old))
            else:
                logger.exception("version %d has not ended", old.version)
        finally:
            self._state = "idle"
            model.is_open.set()
            switched.cancel()  # if the server stops

    def _failure(self, error: Exception, old: AnyVersion) -> Exception:
        """Return what the caller gets of an error; the log has the rest."""
        if isinstance(error, UserError):
            return error.renamed("path") if error.field == "model" else error
        is_known = isinstance(error, OSError)
        logger.error("version %d goes on: %s", old.version, error, exc_info=not is_known)
        reason = "the new version did not start; the server's log has the reason"
        return ReloadFailed(f"{reason}, and version {old.version} goes on")

    def _next_version(self, path: Path, one_by_one: bool | None) -> tuple[AnyVersion, bool]:
        """Return the version in a folder, and whether to exchange replicas one by one. Raises
        UserError."""
        running = _on_this_machine(self._model.current)
        try:
            load_config(path)
            weight_bytes(path, running.config.dtype)
            if one_by_one is None:
                one_by_one = not fits_beside(running, path)
            return self._model.next_version(path), one_by_one
        except OSError as error:
            message = f"{path}: cannot be read ({error.strerror})"
            raise UserError("path", message=message) from error

    async def _exchange_beside(
        self, old: AnyVersion, new: AnyVersion, switched: "asyncio.Future[None]"
    ) -> None:
        try:
            replicas = _on_this_machine(new)
            await replicas.start()
            for index in range(len(replicas)):
                await replicas.replica_ready(index)
        except Exception:
            await self._model.replicas.end(new.replicas)
            raise
        self._switch(new, switched)
        await old.idle()

    async def _exchange_one_by_one(
        self, old: AnyVersion, new: AnyVersion, switched: "asyncio.Future[None]"
    ) -> None:
        before, after = _on_this_machine(old), _on_this_machine(new)
        count = len(before)
        for index in range(count):
            if index + 1 < count:
                await before.retire(index)
            else:
                if not switched.done():
                    self._model.is_open.clear()
                await old.idle()
            await before.stop_replica(index)
            after.start_replica(index)
            if switched.done():
                continue  # the version is known to start; a replica that fails is started again
            try:
                await after.replica_ready(index)
            except Exception:
                await self._model.replicas.end(new.replicas)
                for stopped in range(index + 1):
                    before.start_replica(stopped)
                await before.replica_ready(index)
                raise
            if 2 * (index + 1) >= count:
                self._switch(new, switched)

    def _switch(self, new: Any, switched: "asyncio.Future[None]") -> None:
        """Let the new version take all new requests."""
        self._model.switch(new)
        self._state = "finishing"
        switched.set_result(None)


def _on_this_machine(version: Version) -> Replicas:
    """Return the replicas of a version. Raises UserError if they run on a cluster."""
    if isinstance(version.replicas, Replicas):
        return version.replicas
    raise UserError(
        "path",
        message="replicas on a Ray cluster do not change their model: start another server with "
        "the new version and another --model-name, and stop this one",
    )
