"""Prefixes of prompts that a replica may remember, as far as the server knows.

The server knows which prompts it has sent to a replica, and not what the replica has dropped since.
A prefix that was dropped costs nothing more at the replica where it was than at any other, and is
remembered there again afterwards.
"""

from collections import OrderedDict
from collections.abc import Sequence

from serve.cache.prefix_cache import BLOCK_TOKENS, Digests, block_digests
from serve.request import Request

MOST_BLOCKS = 2**16
"""Blocks of prompts that are known of a replica."""
MOST_COMPARED_TOKENS = 2**15
"""Tokens of a prompt that are compared, as the event loop waits meanwhile."""


def prefix_digests(request: Request) -> Digests:
    """Return digests of the blocks that a prompt begins with and that a replica need not compute if
    it remembers them."""
    if request.pooling == "mean":
        return []
    num_tokens = len(request.prompt_token_ids) - 1
    if request.sampling.prompt_logprobs is not None:
        num_tokens = request.prompt_logprobs_from - 1
    most = min(num_tokens, MOST_COMPARED_TOKENS)
    return block_digests(request.prompt_token_ids[:most], request.prefix_salt)


class SentPrefixes:
    """Blocks of the prompts that a replica was sent."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        """Digests, the least recently sent first."""

    def add(self, digests: Sequence[bytes]) -> None:
        """Note that the replica is sent a prompt with these blocks."""
        for digest in reversed(digests):  # so that the ends of prompts are forgotten first
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > MOST_BLOCKS:
            self._blocks.popitem(last=False)

    def num_tokens(self, digests: Sequence[bytes]) -> int:
        """Return how many tokens of a prompt with these blocks the replica was sent before."""
        low, high = 0, len(digests)
        while (
            low < high
        ):  # a digest includes the blocks before, so all before a known one are known
            middle = (low + high + 1) // 2
            low, high = (middle, high) if digests[middle - 1] in self._blocks else (low, middle - 1)
        return BLOCK_TOKENS * low
