"""Where a request goes: a pure function of what is known of the fleet. No clock, no network, no state."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pdspec.errors import InvalidRequest, Overloaded, PeerLost
from pdspec.types import Handoff, Route, WorkerInfo
from router.placement import Estimate, estimate

MAX_WAITING = 256  # requests that may wait for one decode worker before new ones are turned away
RETRY_AFTER_MS = 500


class WorkerState(StrEnum):
    """What the router thinks of a worker."""

    UNKNOWN = "unknown"  # has not answered yet
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    REFUSED = "refused"  # holds something else than the others
    LOST = "lost"  # does not answer


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """One worker as it is known now. ``pending`` are requests sent to it (less those that ended) since the moment that
    ``info``'s counts stand for."""

    address: str
    role: str  # "prefill" | "decode"
    state: WorkerState
    reason: str = ""
    info: WorkerInfo | None = None  # None until it has answered once
    pending: int = 0
    pending_tokens: int = 0  # of the prompts of those that were sent since

    @property
    def may_return(self) -> bool:
        """Whether it may take requests again: silent, or draining, which ends in a restart or in another role."""
        draining = self.state is WorkerState.DRAINING and self.info is not None and self.info.draining
        return draining or self.state in (WorkerState.LOST, WorkerState.UNKNOWN)

    @property
    def load(self) -> int:
        """Requests it is believed to have."""
        reported = self.info.queued + self.info.running if self.info else 0
        return max(0, reported + self.pending)

    @property
    def waiting(self) -> int:
        """Requests it is believed not to have begun."""
        return max(0, (self.info.queued if self.info else 0) + self.pending)


def choose(
    workers: Sequence[WorkerView],
    *,
    handoff: Handoff,
    relay: str = "",
    tokens: int,
    drafter: str = "",
    exclude: Collection[str] = (),
    max_waiting: int = MAX_WAITING,
    cached: Mapping[str, float] | None = None,
    cache_weight: float = 0.0,
) -> Route:
    """The least-loaded ready decode worker with room, and every usable prefill worker, least loaded first.

    ``cached`` is the share of the prompt whose KV a worker probably has, by address; all of it is worth as much as
    ``cache_weight`` requests of load. A worker that reports an empty cache has nothing.

    ``tokens`` are prompt plus max_tokens; ``exclude`` are addresses that were tried already. Pairs between which the
    decode worker has just failed to get through are avoided. Prefill workers that do not answer come last: the decode
    worker's own policy says what to do when none does. Raises PeerLost when nobody can take it, Overloaded when nobody
    has room, InvalidRequest when it can never fit or needs a relay that is not there.
    """
    if handoff is Handoff.RELAY and not relay:
        message = "this deployment has no relay"
        raise InvalidRequest(message, field="handoff", remedy="ask for direct, or start the router with --relay")
    paths = Route(decode="", prefill=(), handoff=handoff, relay=relay)
    costs = {worker.address: _cost(worker, cached or {}, cache_weight) for worker in workers}
    decode = _choose_decode(workers, tokens, drafter, exclude, max_waiting, paths, costs)
    return replace(paths, decode=decode.address, prefill=_prefill_order(workers, drafter, paths, decode, costs))


def placed(
    workers: Sequence[WorkerView], route: Route, *, prompt_tokens: int, cached: Mapping[str, float]
) -> tuple[Route, Estimate]:
    """The route without prefill workers where the decode worker would have the prompt sooner by the workers' own
    figures, and what those promise. ``cached`` as for ``choose``."""
    by_address = {worker.address: worker for worker in workers}
    decode, prefill = by_address[route.decode], by_address[route.prefill[0]] if route.prefill else None
    if prefill is None or prefill.state is not WorkerState.READY or prefill.info is None or decode.info is None:
        return route, Estimate(elsewhere=None, here=None)
    missing, computed = (
        prompt_tokens * (1.0 - (cached.get(worker.address, 0.0) if _has_pages(worker) else 0.0))
        for worker in (decode, prefill)
    )
    found = estimate(
        decode.info, prefill.info, link=route.link(prefill.address), missing=missing, computed=computed,
        running=decode.load, waiting_tokens=prefill.pending_tokens,
    )  # fmt: skip
    return (replace(route, prefill=()) if found.choice == "local" else route), found


def _has_pages(worker: WorkerView) -> bool:
    return worker.info is not None and worker.info.metrics.get("prefix_cached_pages", 0.0) > 0


def _cost(worker: WorkerView, cached: Mapping[str, float], weight: float) -> float:
    """Its load, less what its cache saves."""
    return worker.load - (weight * cached.get(worker.address, 0.0) if _has_pages(worker) else 0.0)


def _choose_decode(
    workers: Sequence[WorkerView], tokens: int, drafter: str, exclude: Collection[str], max_waiting: int,
    paths: Route, costs: Mapping[str, float],
) -> WorkerView:  # fmt: skip
    prefill = [w.address for w in workers if w.role == "prefill" and w.state is WorkerState.READY]
    every = [worker for worker in workers if worker.role == "decode"]
    ready = [w for w in every if w.state is WorkerState.READY and w.info and w.address not in exclude]
    if not ready:
        raise PeerLost(f"no decode worker is ready: {describe(every, exclude)}", remedy="start one, or try again")
    able = [worker for worker in ready if not drafter or _holds(worker, drafter)]
    if not able:
        remedy = "name a drafter that every decode worker holds"
        raise PeerLost(f"no ready decode worker holds {drafter!r}", field="drafter", remedy=remedy)
    fitting = [worker for worker in able if _capacity(worker) >= tokens]
    if not fitting:
        message = f"prompt and max_tokens need {tokens} tokens of KV, the largest decode worker holds "
        message += str(max(_capacity(worker) for worker in able))
        raise InvalidRequest(message, field="sampling.max_tokens", remedy="ask for less, or raise cache_tokens")
    least = min(
        fitting,
        key=lambda worker: (
            bool(prefill) and all(_is_cut_off(worker, address, paths) for address in prefill),
            _room(worker) < tokens and worker.load > 0, costs[worker.address], worker.load, -_room(worker),
        ),
    )  # fmt: skip
    if least.waiting >= max_waiting and all(worker.waiting >= max_waiting for worker in fitting):
        message = f"{least.waiting} requests wait for every decode worker"
        raise Overloaded(message, retry_after_ms=RETRY_AFTER_MS, remedy=f"try again in {RETRY_AFTER_MS} ms")
    return least


def _is_cut_off(decode: WorkerView, prefill: str, paths: Route) -> bool:
    return decode.info is not None and paths.link(prefill) in decode.info.unreachable


def _prefill_order(
    workers: Sequence[WorkerView], drafter: str, paths: Route, decode: WorkerView, costs: Mapping[str, float]
) -> tuple[str, ...]:
    every = [worker for worker in workers if worker.role == "prefill"]
    usable = [worker for worker in every if worker.state is WorkerState.READY]
    usable.sort(
        key=lambda worker: (
            _is_cut_off(decode, worker.address, paths), bool(drafter) and not _holds(worker, drafter),
            costs[worker.address], worker.load,
        )
    )  # fmt: skip
    silent = [worker for worker in every if worker.state in (WorkerState.UNKNOWN, WorkerState.LOST)]
    if every and not usable and not silent:
        message = f"no prefill worker takes requests: {describe(every)}"
        raise PeerLost(message, remedy="start one that matches the decode workers")
    return tuple(worker.address for worker in (*usable, *silent))


def reference_fingerprint(workers: Sequence[WorkerView]) -> str:
    """The content fingerprint that all must hold: that of most decode workers that answer, on a tie of the one named
    first; of prefill workers when no decode worker answers; empty when nobody does."""
    answers = (WorkerState.READY, WorkerState.DRAINING, WorkerState.REFUSED)
    for role in ("decode", "prefill"):
        held = [w.info.fingerprint for w in workers if w.info and w.state in answers and w.role == role]
        if held:
            return max(held, key=held.count)  # the first of the most frequent
    return ""


def describe(workers: Sequence[WorkerView], exclude: Collection[str] = ()) -> str:
    """Each worker's address and state in words."""
    if not workers:
        return "none is configured"
    lost = {worker.address: "failed this request" for worker in workers if worker.address in exclude}
    texts = [f"{w.address} {lost.get(w.address) or w.state.value} {w.reason}".strip() for w in workers]
    return "; ".join(texts)


def _holds(worker: WorkerView, drafter: str) -> bool:
    return worker.info is not None and drafter in worker.info.drafters


def _capacity(worker: WorkerView) -> int:
    return worker.info.total_pages * worker.info.page_size if worker.info else 0


def _room(worker: WorkerView) -> int:
    return worker.info.free_pages * worker.info.page_size if worker.info else 0
