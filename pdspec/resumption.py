"""One answer as a client follows it over broken streams: what came, what is asked for next, and whether to ask again.

The blocking and the asynchronous client differ in how they wait, and in nothing else.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from dataclasses import dataclass

import grpc

from pdspec.types import TokenChunk, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.codec import chunk_from_pb, user_request_to_pb
from pdspec.wire.status import is_broken

RECONNECT_S = 15.0
_PAUSES_S = (0.05, 0.1, 0.2, 0.4)  # between attempts; the last one from then on


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One message of an answer: its tokens, and the whole characters that they complete."""

    chunk: TokenChunk
    text: str
    seed: int = 0  # with the first piece


class Resumption:
    """``reconnect_s`` without a token are waited for a router that broke off; ``answered`` says whether this router has
    ever answered."""

    def __init__(self, request: UserRequest, *, timeout_s: float | None, reconnect_s: float, answered: bool) -> None:
        self._request = dataclasses.replace(request, request_id=request.request_id or uuid.uuid4().hex)
        self._have, self._seed = list(request.resume_ids), request.sampling.seed
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._reconnect_s, self.answered = reconnect_s, answered
        self._heard, self._attempt = time.monotonic(), 0  # since the last message

    def message(self) -> pb.GenerateRequest:
        """What to ask for: the answer, or what comes after the tokens that are here."""
        sampling = dataclasses.replace(self._request.sampling, seed=self._seed)
        return user_request_to_pb(dataclasses.replace(self._request, sampling=sampling, resume_ids=tuple(self._have)))

    def left_s(self) -> float | None:
        """Seconds that the call may take."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def took(self, message: pb.GenerateChunk) -> Piece:
        """A message came."""
        piece = Piece(chunk=chunk_from_pb(message), text=message.text, seed=message.seed)
        self.answered, self._heard, self._attempt = True, time.monotonic(), 0
        self._have += piece.chunk.token_ids
        self._seed = piece.seed if self._seed is None else self._seed
        return piece

    def pause_s(self, error: grpc.RpcError) -> float | None:
        """How long to wait before the rest is asked for; None: ``error`` is the end of it."""
        waited = time.monotonic() - self._heard
        if not (is_broken(error) and self.answered and waited < self._reconnect_s):
            return None
        self._attempt += 1
        return _PAUSES_S[min(self._attempt, len(_PAUSES_S)) - 1]
