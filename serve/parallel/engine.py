"""The engine of a group's first rank, whose calls the other ranks repeat."""

import weakref
from dataclasses import asdict
from pathlib import Path

import torch

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.parallel.followers import Followers, digest_of
from serve.parallel.ranks import join, leave, meeting_place, release
from serve.request import Output, Request
from serve.sampling_params import Constraint
from serve.wire import pack, request_to_wire
from stu.model_dir import load_model
from stu.tokenizer import Tokenizer


class GroupEngine(Engine):
    """An engine whose calls go to the other ranks too, which decode the same requests and choose
    the same tokens. The arguments are those of `serve.parallel.loading.make_engine`."""

    def __init__(
        self,
        model: str | Path,
        devices: list[str],
        dtype: torch.dtype,
        tokenizer: Tokenizer,
        config: EngineConfig,
        ends_process: bool,
    ) -> None:
        place = meeting_place(len(devices))
        settings = {
            "model": str(model),
            "dtype": str(dtype).removeprefix("torch."),
            "engine": asdict(config),
            "size": len(devices),
            "port": place.port,
            # A thread of a user's program may end before the program.
            "dies_with_parent": ends_process,
        }
        self._turn: list[bytes] = []
        """Calls since the last step, packed one by one: a failure is that of one call alone."""
        self._digest = 0
        self._followers = Followers(devices, settings, ends_process, release)
        self._end = weakref.finalize(self, _end, self._followers)
        try:
            self._followers.wait()
            ranks = join(place, 0, len(devices), devices[0], config.batch_invariant)
            part = load_model(model, devices[0], dtype, config.weights, ranks)
            super().__init__(part, tokenizer, config)
            del part  # the engine keeps what it needs
            self._followers.wait()
        except BaseException:
            self._end()
            raise

    def compile(self, constraint: Constraint) -> None:
        self._followers.send({"compile": asdict(constraint)})
        super().compile(constraint)

    def add_checked(self, request: Request) -> int:
        # If it is refused, all refuse it.
        self._turn.append(pack({"add": request_to_wire(request)}))
        return super().add_checked(request)

    def abort(self, request_id: int) -> None:
        self._turn.append(pack({"abort": request_id}))
        super().abort(request_id)

    def step(self) -> list[Output]:
        """Run one step on every rank. Raises RuntimeError if one has ended."""
        self._followers.require_all()
        self._followers.send({"turn": self._turn, "digest": self._digest})
        self._turn = []
        try:
            outputs = super().step()
        except Exception as error:
            self._followers.require_all(error)
            raise
        self._digest = digest_of(outputs)
        return outputs

    def check_integrity(self) -> None:
        self._followers.send({"check": True})
        super().check_integrity()

    def close(self) -> None:
        """End the other ranks, which otherwise end with this process. It is not used again."""
        self._end()


def _end(followers: Followers) -> None:
    followers.close()
    leave()
