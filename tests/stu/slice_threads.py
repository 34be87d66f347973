"""Ranks that are threads of this process, and what they compute together."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from stu.slices.channels import ChannelRanks
from stu.slices.ranks import SliceRanks


class Meeting:
    """The place where threads exchange tensors, each with all others."""

    def __init__(self, size: int) -> None:
        self.parts: list[Sequence[Tensor]] = [()] * size
        self.barrier = threading.Barrier(size, timeout=60)


class ThreadRanks(SliceRanks):
    """A thread among `size`, which counts the bytes that it sends to the others."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)
        self._meeting = meeting
        self.sent: list[int] = []
        """Bytes of each exchange."""

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        self.sent.append(sum(p.nbytes for i, p in enumerate(parts) if i != self.rank))
        self._meeting.parts[self.rank] = parts
        self._meeting.barrier.wait()
        received = [sent[self.rank].clone() for sent in self._meeting.parts]
        self._meeting.barrier.wait()
        assert [tuple(part.shape) for part in received] == [tuple(shape) for shape in shapes]
        assert len({part.dtype for part in received}) == 1
        return received


class ChannelThreadRanks(ChannelRanks):
    """A thread among `size` that have channels of their own."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)
        self._meeting = meeting

    def all(self, part: Tensor) -> Tensor:
        self._meeting.parts[self.rank] = [part]
        self._meeting.barrier.wait()
        sent = [parts[0] for parts in self._meeting.parts]
        assert len({(own.shape, own.dtype) for own in sent}) == 1
        received = torch.stack(sent)
        self._meeting.barrier.wait()
        return received


def in_threads(
    size: int, compute: Callable[..., object], kind: Callable[..., object] = ThreadRanks
) -> list:
    """Run a function of each of `size` ranks, of a kind, at once, and return the results."""
    meeting = Meeting(size)
    ranks = [kind(rank, size, meeting) for rank in range(size)]

    def run(own: object) -> object:
        torch.set_num_threads(1)
        try:
            return compute(own)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, own) for own in ranks]]
