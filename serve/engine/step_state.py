"""The numbers of a static step: packed on the host, and copied to the device at once.

The host fills one of several pinned buffers in turn, and fills it again only once the device has
copied it: a buffer that is overwritten before would give a step the rows of a later one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from serve.cache.static_step import Numbers, StaticStep

NUM_BUFFERS = 3
ROW, TOKEN, OWN = 0, 1, 2
"""Places among the numbers of a row: the row, its last token, and from there on those of caches."""
ON_DEVICE = -1
"""Number in place of a token that the host does not know yet: the last one chosen on the device."""


class Event(Protocol):
    """A point in the order of a device's work."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""


class _Reached:
    def synchronize(self) -> None:
        pass


Copy = Callable[[Tensor, Tensor], Event]
"""Function of a target and a source, which copies after all earlier work, and returns an event that
follows."""


def copy_in_order(target: Tensor, source: Tensor) -> Event:
    """Copy to or from a device without waiting for it, and return the event that follows."""
    target.copy_(source, non_blocking=True)
    return event_on(target.device if target.is_cuda else source.device)


def event_on(device: torch.device) -> Event:
    """Return an event that follows what the device has been given to do."""
    if device.type != "cuda":
        return _Reached()
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class StepNumbers(NamedTuple):
    """Numbers of one step on the host."""

    rows: Numbers
    """Numbers of each row, `[max_batch, OWN + ..]`."""
    by_cache: list[tuple[Numbers, Numbers]]
    """Numbers for each cache to fill in: those that rows share, and those of each row."""


class StepState:
    """The numbers of a static step, at one address on the device.

    Args:
        steps: The caches' static steps.
        max_batch: Most rows of a step.
        device: Device of the numbers.
        copy: Copies a buffer to the device.
    """

    def __init__(
        self,
        steps: Sequence[StaticStep],
        max_batch: int,
        device: torch.device,
        copy: Copy = copy_in_order,
    ) -> None:
        self._copy = copy
        self._num_shared = sum(step.num_shared for step in steps)
        self._width = OWN + sum(step.num_own for step in steps)
        self._shared, self._own = [], []
        shared, own = 0, OWN
        for step in steps:
            self._shared.append(slice(shared, shared + step.num_shared))
            self._own.append(slice(own, own + step.num_own))
            shared, own = shared + step.num_shared, own + step.num_own
        size = self._num_shared + max_batch * self._width
        self._numbers = torch.zeros(size, dtype=torch.int64, device=device)
        self._buffers = [
            torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
            for _ in range(NUM_BUFFERS)
        ]
        self._copied: list[Event] = [_Reached()] * NUM_BUFFERS
        """Event after the last copy of each buffer."""
        self._turn = 0

    def fill(self) -> StepNumbers:
        """Return the numbers of the next step, to be filled in."""
        self._copied[self._turn].synchronize()
        buffer: Numbers = self._buffers[self._turn].numpy()
        shared = buffer[: self._num_shared]
        rows = buffer[self._num_shared :].reshape(-1, self._width)
        parts = zip(self._shared, self._own, strict=True)
        return StepNumbers(rows, [(shared[first], rows[:, own]) for first, own in parts])

    def send(self, batch: int) -> None:
        """Copy the numbers that were filled in for a step of `batch` rows to the device."""
        used = slice(self._num_shared + batch * self._width)
        buffer = self._buffers[self._turn]
        self._copied[self._turn] = self._copy(self._numbers[used], buffer[used])
        self._turn = (self._turn + 1) % NUM_BUFFERS

    def on_device(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the numbers that rows share, and those of each of `batch` rows."""
        rows = self._numbers[self._num_shared :].view(-1, self._width)
        return self._numbers[: self._num_shared], rows[:batch]

    def of_cache(self, index: int, shared: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return a cache's part of the numbers that rows share, and of those of rows."""
        return shared[self._shared[index]], rows[:, self._own[index]]
