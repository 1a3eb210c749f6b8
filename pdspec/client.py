"""A synchronous client of ``pdspec.v1.Router``: what the command line, the studies and user scripts call.

    with RouterClient("127.0.0.1:50051") as client:
        for piece in client.stream(UserRequest(text="Once upon a time")):
            print(piece.text, end="")

A router that dies under an answer and comes back is asked for the rest of it: same request id, same seed, and the
tokens that came already, so that the iteration goes on with each token once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc

from pdspec.config import RouterConfig, TlsConfig
from pdspec.errors import Cancelled, PeerLost, Unauthenticated
from pdspec.resumption import RECONNECT_S, Piece, Resumption
from pdspec.types import GenerationStats, TokenChunk, TokenLogprob, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_client_channel
from pdspec.wire.status import from_rpc_error
from pdspec.wire.trust import TokenFile, Trust, bearer


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer with what it took, as the client saw it. Times in milliseconds."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_match: str
    seed: int
    stats: GenerationStats
    ttft_ms: float  # request sent to first token
    total_ms: float
    piece_ms: tuple[float, ...]  # when each piece came
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)

    @property
    def tpot_ms(self) -> float:
        """Mean time of an output token after the first; 0 for a single token."""
        later = len(self.token_ids) - 1
        return (self.total_ms - self.ttft_ms) / later if later > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields that every ``--json`` of an answer has."""
        stats = self.stats
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "prompt_tokens": stats.prompt_tokens,
            "output_tokens": len(self.token_ids),
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": round(self.tpot_ms, 3),
            "total_ms": round(self.total_ms, 3),
            "acceptance_length": round(stats.acceptance_length, 4),
            "verifications": stats.verifications,
            "first_draft_accepted": stats.first_draft_accepted,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
            "drafter": stats.drafter,
            "handoff": stats.handoff,
            "prefill_worker": stats.prefill_worker,
            "decode_worker": stats.decode_worker,
            "kv_bytes": stats.kv_bytes,
            "draft_kv_bytes": stats.draft_kv_bytes,
            "hidden_bytes": stats.hidden_bytes,
            "cached_tokens": stats.cached_tokens,
            "prefill_cached_tokens": stats.prefill_cached_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a user shows to a router. ``tls.ca`` alone asks for TLS; ``tls.cert`` and ``tls.key`` where the router asks
    for a certificate. The token is never printed."""

    tls: TlsConfig = field(default_factory=TlsConfig)
    token: str = field(default="", repr=False)

    def trust(self) -> Trust:
        """For the channel."""
        return Trust(tls=self.tls)

    @staticmethod
    def of(config: RouterConfig) -> Access:
        """That of the deployment itself, for a process that has its settings. Raises ConfigError."""
        path = config.cluster_token_file or config.token_file
        return Access(tls=config.tls, token=TokenFile(path, field="token_file").first() if path else "")


class RouterClient:
    """One channel to a router. Not shared between threads; close it, or use it in ``with``. ``access`` says what a
    router with TLS or tokens is shown; raises ConfigError for files that cannot be read.

    A router that has answered once and is gone is waited for, ``reconnect_s`` without a token (0: not at all).
    """

    def __init__(
        self, endpoint: str, access: Access | None = None, *, reconnect_s: float = RECONNECT_S
    ) -> None:
        self.endpoint, self._access, self.reconnect_s = endpoint, access or Access(), reconnect_s
        self.reconnects = 0  # streams taken up again
        self._answered = self._left = False
        self._call: Any = None
        self._channel = make_client_channel(endpoint, self._access.trust())
        self._stub = rpc.RouterStub(self._channel)

    def stream(self, request: UserRequest, *, timeout_s: float | None = None) -> Iterator[Piece]:
        """The answer as it comes. Closing the iterator cancels the request on every hop. Raises the PdspecError
        that the cluster sent, PeerLost when there is no router."""
        progress = Resumption(request, timeout_s=timeout_s, reconnect_s=self.reconnect_s, answered=self._answered)
        self._left = False
        while True:
            shown = bearer(self._access.token)
            call = self._call = self._stub.Generate(progress.message(), timeout=progress.left_s(), metadata=shown)
            try:
                for message in call:
                    piece = progress.took(message)
                    self._answered = True
                    yield piece
                    if piece.chunk.finish_reason is not None:
                        return
                return
            except grpc.RpcError as error:
                if self._left:
                    raise Cancelled("this client left") from error
                if (pause := progress.pause_s(error)) is None:
                    raise explained(error, self.endpoint) from error
            finally:
                call.cancel()
            self.reconnects += 1
            time.sleep(pause)

    def cancel(self) -> None:
        """End the stream that runs, which then raises Cancelled; the one method that any thread may call."""
        self._left = True
        if self._call is not None:
            self._call.cancel()

    def generate(
        self,
        request: UserRequest,
        *,
        on_text: Callable[[str], None] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """The whole answer; ``on_text`` is called with each new part of the text."""
        return collect(self.stream(request, timeout_s=timeout_s), on_text)

    def workers(self, *, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """What the router knows of each worker (``WorkerStatus`` of the proto as a map)."""
        answer = self._list(timeout_s)
        self._answered = True
        return [worker_map(worker) for worker in answer.workers]

    def requests(self, *, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """The requests under way, in order of arrival (``RequestStatus`` of the proto as a map)."""
        names = [entry.name for entry in pb.RequestStatus.DESCRIPTOR.fields]
        return [{name: getattr(found, name) for name in names} for found in self._list(timeout_s).requests]

    def _list(self, timeout_s: float) -> pb.ListWorkersResponse:
        shown = bearer(self._access.token)
        try:
            return self._stub.ListWorkers(pb.ListWorkersRequest(), timeout=timeout_s, metadata=shown)
        except grpc.RpcError as error:
            raise explained(error, self.endpoint) from error

    def wait_ready(self, *, workers: int = 1, timeout_s: float = 30.0) -> None:
        """Return when the router answers and calls at least ``workers`` of its workers ready. Raises PeerLost."""
        deadline, seen = time.monotonic() + timeout_s, "no answer"
        while time.monotonic() < deadline:
            with contextlib.suppress(PeerLost):
                states = {entry["worker_id"] or entry["address"]: entry for entry in self.workers(timeout_s=1.0)}
                if sum(entry["state"] == "ready" for entry in states.values()) >= workers:
                    return
                seen = ", ".join(f"{name} {e['state']} {e['reason']}".strip() for name, e in states.items()) or "none"
            time.sleep(0.05)
        raise PeerLost(f"router {self.endpoint}: {workers} workers were not ready in {timeout_s:g} s: {seen}")

    def close(self) -> None:
        """End the channel and every call on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def explained(error: grpc.RpcError, endpoint: str) -> Exception:
    """The typed error of a failed call, with what a user can do about a router that does not answer."""
    found = from_rpc_error(error, peer=endpoint)
    text = found.message.lower()
    if isinstance(found, PeerLost) and ("handshake" in text or "ssl" in text or "certificate" in text):
        remedy = "give the deployment's --tls-ca, and --tls-cert and --tls-key where it asks for a certificate"
        return Unauthenticated(f"no TLS with {endpoint}: {found.message[-200:]}", field="tls", remedy=remedy)
    if isinstance(found, PeerLost) and "failed to connect" in text:
        remedy = "start one with `pdspec up`, or name another with --endpoint; one with TLS needs --tls-ca, and"
        remedy += " --tls-cert and --tls-key where it asks for certificates"
        return PeerLost(f"no router answers at {endpoint}", field="endpoint", remedy=remedy)
    return found


def worker_map(worker: pb.WorkerStatus) -> dict[str, Any]:
    """A ``WorkerStatus`` of the proto as a plain map."""
    plain = {entry.name: getattr(worker, entry.name) for entry in pb.WorkerStatus.DESCRIPTOR.fields}
    return {
        **plain,
        "drafters": list(worker.drafters),
        "unreachable": list(worker.unreachable),
        "metrics": dict(worker.metrics),
    }


class Collected:
    """Puts an answer together, piece by piece; the clock starts with it. Raises PeerLost when a token is left out or
    repeated, or the last message is missing: a cut answer never looks complete."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._times, self._ids, self._texts = list[float](), list[int](), list[str]()
        self._logprobs = list[TokenLogprob]()
        self._seed = 0
        self._last: TokenChunk | None = None

    def add(self, piece: Piece) -> None:
        """The next one."""
        chunk = piece.chunk
        if chunk.start != len(self._ids):
            raise PeerLost(f"tokens {len(self._ids)}..{chunk.start} of the answer are missing or repeated")
        self._times.append(1e3 * (time.perf_counter() - self._begin))
        self._seed = self._seed or piece.seed
        self._ids += chunk.token_ids
        self._logprobs += chunk.logprobs
        self._texts.append(piece.text)
        if chunk.finish_reason is not None:
            self._last = chunk

    def answer(self) -> Answer:
        """The whole of it."""
        last = self._last
        if last is None:
            raise PeerLost("the answer ended without its last message")
        return Answer(
            text="".join(self._texts),
            token_ids=tuple(self._ids),
            finish_reason=str(last.finish_reason),
            stop_match=last.stop_match,
            seed=self._seed,
            stats=last.stats or GenerationStats(),
            ttft_ms=self._times[0],
            total_ms=1e3 * (time.perf_counter() - self._begin),
            piece_ms=tuple(self._times),
            logprobs=tuple(self._logprobs),
        )


def collect(pieces: Iterable[Piece], on_text: Callable[[str], None] | None = None) -> Answer:
    """Put an answer together; the clock starts here. Raises as ``Collected``."""
    collected = Collected()
    for piece in pieces:
        collected.add(piece)
        if on_text and piece.text:
            on_text(piece.text)
    return collected.answer()
