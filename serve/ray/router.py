"""The router of requests to the replicas of Ray Serve.

It does what `serve.server.replicas.dispatch` does in a server without Ray: a request goes to the
least busy replica, or to one that remembers more of its prompt. Each server routes its own requests
and knows of those of others only how many there are.
"""

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.cache.prefix_cache import Digests
from serve.server.replicas.prefixes import SentPrefixes

DIGEST_BYTES = 8
"""Bytes of a digest that are sent along: a wrong match only makes a wrong guess."""


def pack_prefix(digests: Digests) -> bytes:
    """Return the digests of a prompt for `EngineReplica.decode`."""
    return b"".join(digest[:DIGEST_BYTES] for digest in digests)


class _Known:
    """Prompts and requests that a replica was sent."""

    def __init__(self) -> None:
        self.prefixes = SentPrefixes()
        self.costs: dict[str, int] = {}
        """Tokens that requests need, by the requests' ids."""


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Routes requests for `EngineReplica.decode`."""

    def initialize_state(self, **_: Any) -> None:
        self._known: dict[ReplicaID, _Known] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates, the best ones first."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        digests, own_cost = _digests_and_cost(pending_request)

        def tokens_before_first(replica: RunningReplica) -> int:
            known = self._known.get(replica.replica_id)
            if known is None:
                return 0
            others = self.replica_queue_len_cache.get(replica.replica_id) or 0
            others = max(0, others - len(known.costs))
            remembered = known.prefixes.num_tokens(digests)
            return sum(known.costs.values()) + others * own_cost - 2 * remembered

        return [[replica] for replica in sorted(candidate_replicas, key=tokens_before_first)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        digests, cost = _digests_and_cost(pending_request)
        known = self._known.setdefault(replica_id, _Known())
        cost -= known.prefixes.num_tokens(digests)
        known.prefixes.add(digests)
        known.costs[pending_request.metadata.internal_request_id] = cost

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        if (known := self._known.get(replica_id)) is not None:
            known.costs.pop(internal_request_id, None)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._known.pop(replica_id, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        running = {replica.replica_id for replica in replicas}
        self._known = {place: known for place, known in self._known.items() if place in running}


def _digests_and_cost(request: PendingRequest | None) -> tuple[Sequence[bytes], int]:
    """Return the values that the server sent along with a request; nothing for other methods."""
    values = {} if request is None else request.kwargs
    prefix = values.get("prefix", b"")
    starts = range(0, len(prefix), DIGEST_BYTES)
    return [prefix[start : start + DIGEST_BYTES] for start in starts], values.get("cost", 0)
