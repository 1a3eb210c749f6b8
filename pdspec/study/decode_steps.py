"""A decode worker's steps while handoffs land on it, and while none do, in turns.

The prefill worker is a replay: it computes nothing, so that what is seen is the landing, not a neighbour's prefill.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import grpc

from pdspec.config import WorkerConfig
from pdspec.errors import PdspecError
from pdspec.model.files import resolve
from pdspec.study.processes import process
from pdspec.study.replay import TARGET, Wish, arguments
from pdspec.study.stack import Stack
from pdspec.types import GenerateRequest, Route, SamplingParams
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import USER_MESSAGE_BYTES, size_options
from pdspec.wire.codec import decode_request_to_pb
from pdspec.wire.status import from_rpc_error

PROMPT = 64  # of the running answer
_WAIT_S = 120.0


class _Answers:
    """Requests put to one decode worker."""

    def __init__(self, stub: rpc.DecodeWorkerStub, decode: str, prefill: str) -> None:
        self.stub, self.decode, self.prefill = stub, decode, prefill
        self.arrived: list[float] = []  # of the running answer's chunks
        self.steady = threading.Event()

    def run_on(self, max_tokens: int) -> grpc.Call:
        """The answer whose steps are watched, prefilled by the decode worker itself."""
        ids = tuple(range(1, PROMPT + 1))
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)
        request = GenerateRequest(request_id="watched", prompt_ids=ids, drafter="none", sampling=params)
        return self.stub.Decode(decode_request_to_pb(request, Route(decode=self.decode, prefill=())))

    def watch(self, call: grpc.Call) -> None:
        """Note when its chunks come, until it is cancelled or ends."""
        try:
            for _ in call:
                self.arrived.append(time.perf_counter())
                if len(self.arrived) == 8:
                    self.steady.set()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:  # type: ignore[attr-defined]
                raise from_rpc_error(error) from error

    def hand_over(self, tokens: int, seconds: float) -> tuple[float, float]:
        """One handoff: when it was asked for, when it had landed but for Done. Raises what the worker says."""
        params = SamplingParams(max_tokens=2, ignore_eos=True, seed=0)
        wish = Wish(seconds=seconds)
        request = GenerateRequest(request_id=wish.text, prompt_ids=(1,) * tokens, drafter="none", sampling=params)
        call = self.stub.Decode(decode_request_to_pb(request, Route(decode=self.decode, prefill=(self.prefill,))))
        began, first = time.perf_counter(), 0.0
        try:
            for _ in call:
                first = first or time.perf_counter()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return began, first


def steps_beside_handoffs(
    config: WorkerConfig, tokens: int, seconds: float, turns: int
) -> tuple[list[float], list[float]]:
    """Milliseconds between tokens of a running answer of batch 1: (quiet, while a handoff of ``tokens`` over
    ``seconds`` lands), from ``turns`` of each. Raises PdspecError when the answer ends too early."""
    windows: list[tuple[bool, float, float]] = []
    with _deployment(config, tokens) as answers, ThreadPoolExecutor(1) as pool:
        model = resolve(config.model, config.cache_dir or None).config
        call = answers.run_on(model.max_context - PROMPT)
        watching = pool.submit(answers.watch, call)
        try:
            if not answers.steady.wait(_WAIT_S):
                raise PdspecError("the watched answer did not start", remedy="see the worker's log")
            answers.hand_over(tokens, 0.0)  # warms up
            for _ in range(turns):
                began = time.perf_counter()
                time.sleep(seconds)
                windows.append((False, began, time.perf_counter()))
                windows.append((True, *answers.hand_over(tokens, seconds)))
            if watching.done():
                raise PdspecError("the watched answer ended too early", remedy="fewer runs, or shorter handoffs")
        finally:
            call.cancel()
            watching.result(_WAIT_S)
    return _within(answers.arrived, windows, False), _within(answers.arrived, windows, True)


@contextmanager
def _deployment(config: WorkerConfig, tokens: int) -> Iterator[_Answers]:
    group = resolve(config.model, config.cache_dir or None).config.cache_group(TARGET, config.dtype)
    with Stack(config, prefill=0) as stack, process("pdspec.study.replay", *arguments(group, tokens)) as prefill:
        (decode,) = stack.addresses["decode"]
        with grpc.insecure_channel(decode, options=size_options(USER_MESSAGE_BYTES)) as channel:
            yield _Answers(rpc.DecodeWorkerStub(channel), decode, prefill.address)


def _within(arrived: list[float], windows: list[tuple[bool, float, float]], landing: bool) -> list[float]:
    """Gaps that lie whole within a window of one kind, in milliseconds."""
    gaps = list(pairwise(arrived))
    chosen = [(began, ended) for kind, began, ended in windows if kind is landing]
    return [1e3 * (b - a) for a, b in gaps if any(began <= a and b <= ended for began, ended in chosen)]
