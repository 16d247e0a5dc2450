"""Ray Serve's choice of a replica by adapter: requests go to the adapter's homes, the few replicas that keep it
loaded."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from veneer.ray.serving.rendezvous import Traffic, order
from veneer.serve.http.call import Call


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """Router that sends a request to one of its adapter's homes, the few replicas that keep the adapter loaded.

    Requests for the base go to the least loaded replica. Loads are Ray's: the requests of all ingresses that a replica
    last reported, and the requests sent since.
    """

    def initialize_state(self) -> None:
        """Initialize empty traffic counts."""
        self._traffic = Traffic()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas for a request, best first. Each is in a list of its own, because Ray tries these lists in
        order.
        """
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = self.replica_queue_len_cache
        loads = {id: queues.get(replica.replica_id) or 0 for id, replica in replicas.items()}
        name = _name_of(pending_request)
        if name is None:
            return [[replicas[id]] for id in order("", loads, len(loads))]
        if pending_request is not None and not pending_request.routing_context.should_backoff:  # its first try
            pending_request.routing_context.should_backoff = True
            self._traffic.add(name)
        return [[replicas[id]] for id in order(name, loads, self._traffic.n_homes(name, len(loads)))]


def _name_of(pending: PendingRequest | None) -> str | None:
    """Return the model name that a request asks for; None for the base, and for requests of Ray itself."""
    call = pending.args[0] if pending is not None and pending.args else None
    return call.name if isinstance(call, Call) else None
