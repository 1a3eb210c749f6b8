"""``pdspec chaos fuzz``: whatever bytes come, frames, requests and settings are taken or refused by a typed error.

The search is guided by outcomes: an input that is refused for a new reason joins the ones that are broken further. No
case may raise anything else, take longer than three seconds, or leave memory or descriptors behind. The same seed gives
the same cases.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from google.protobuf.message import DecodeError

from pdspec.config import ClusterConfig
from pdspec.errors import ConfigError, InvalidRequest, PdspecError, TransferDamaged, UnknownName
from pdspec.prompting import to_generate_request
from pdspec.spec.tree import parse_tree
from pdspec.study import fuzz_inputs as inputs
from pdspec.transfer.frames import DATA_FRAMES, ErrorFrame, parse_frame, parse_message
from pdspec.transfer.ledger import Ledger
from pdspec.transfer.schema import Frame
from pdspec.validation import check_request, check_user_request
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.codec import decode_request_from_pb, user_request_from_pb

HANG_S = 3.0  # of this process, whatever else the machine does
SHARES = {"frames": 0.6, "requests": 0.36, "config": 0.04}  # YAML is slow
MAX_GROWTH_MB = 24.0  # from the middle of a run to its end: allocators keep some
VOCABULARY, CONTEXT = 512, 2048
_VALUES = re.compile(r"[0-9]+|'.*'")
Target = tuple[Callable[[bytes], str], tuple[type[BaseException], ...]]


class _Hang(BaseException):
    """A case that does not end; no handler of the code under test catches it."""


def run(*, cases: int, seed: int, progress: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """The report; ``ok`` without crash, hang and leak."""
    began, found = time.monotonic(), {}
    fds = _descriptors()
    with tempfile.TemporaryDirectory(prefix="pdspec-fuzz-") as folder, _alarm() as arm:
        targets: dict[str, tuple[Target, inputs.Mutator]] = {
            "frames": ((_frame, (TransferDamaged,)),
                       inputs.Mutator(seed, inputs.frame_corpus(), inputs.odd_frame)),
            "requests": ((_request, (InvalidRequest, UnknownName)),
                         inputs.Mutator(seed + 1, inputs.request_corpus(), inputs.odd_request)),
            "config": ((lambda data: _config(data, Path(folder)), (ConfigError,)),
                       inputs.Mutator(seed + 2, inputs.config_corpus(), inputs.odd_config)),
        }  # fmt: skip
        for name, (target, mutator) in targets.items():
            count = round(cases * SHARES[name])
            progress(f"{name}: {count} cases")
            found[name] = _fuzz(target, mutator, count, arm)
    left = _descriptors() - fds
    grown = max(part["grown_mb"] for part in found.values())
    crashes = [{"target": name, **crash} for name, part in found.items() for crash in part.pop("crashes")]
    hangs = sum(part["hangs"] for part in found.values())
    return {
        "ok": not crashes and not hangs and left <= 0 and grown <= MAX_GROWTH_MB,
        "cases": sum(part["cases"] for part in found.values()),
        "seed": seed,
        "crashes": crashes[:20],
        "crash_count": len(crashes),
        "hangs": hangs,
        "leaked_descriptors": max(0, left),
        "grown_mb": grown,
        "targets": found,
        "seconds": round(time.monotonic() - began, 1),
    }


def _fuzz(target: Target, mutator: inputs.Mutator, count: int, arm: Callable[[float], None]) -> dict[str, Any]:
    case, typed = target
    outcomes: Counter[str] = Counter()
    reasons: set[str] = set()
    crashes: list[dict[str, str]] = []
    hangs, slowest, middle = 0, 0.0, 0.0
    for index in range(count):
        if index == count // 2:
            middle = _resident_mb()
        data, start = mutator.next(), time.process_time()
        arm(HANG_S)
        try:
            outcome = reason = case(data)
        except _Hang:
            hangs += 1
            outcome = reason = "hang"
            crashes.append({"error": f"no end after {HANG_S:g} s", "input": data[:400].hex()})
        except typed as error:
            outcome, reason = type(error).__name__, _reason(error)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001  the finding: nothing else may come out
            outcome = reason = f"crash {type(error).__name__}: {error}"[:120]
            crashes.append({"error": f"{type(error).__name__}: {error}"[:200], "input": data[:400].hex()})
        finally:
            arm(0)
        slowest = max(slowest, time.process_time() - start)
        outcomes[outcome] += 1
        if reason not in reasons and len(reasons) < 4096:
            reasons.add(reason)
            mutator.keep(data)
    gc.collect()
    return {
        "cases": count, "outcomes": dict(outcomes.most_common(12)), "reasons": len(reasons), "crashes": crashes,
        "hangs": hangs, "slowest_ms": round(1e3 * slowest, 1), "grown_mb": round(max(0.0, _resident_mb() - middle), 1),
    }  # fmt: skip


def _frame(data: bytes) -> str:
    """Parse; what parses is written and read again alike, and counted by a ledger."""
    kinds = [_same(frame) for frame in parse_message(data)]
    return kinds[0] if len(kinds) == 1 else "several frames"


def _same(frame: Frame) -> str:
    again = parse_frame(frame.to_bytes())
    if type(again) is not type(frame) or again.to_bytes() != frame.to_bytes():
        raise AssertionError(f"{frame.kind} changes on the way")
    ledger = Ledger(frame.epoch)
    if isinstance(frame, DATA_FRAMES):
        ledger.add(frame)
    if isinstance(frame, ErrorFrame) and not isinstance(frame.to_error(), PdspecError):
        raise AssertionError("an error that is none")
    return frame.kind


def _request(data: bytes) -> str:
    """What the router does before any work, and what a worker does."""
    known = {"drafters": ("none", "ngram", "eagle3"), "models": ("tiny",), "parse_tree": parse_tree}
    limits = {"vocab_size": VOCABULARY, "max_context": CONTEXT}
    try:
        if data[:1] == b"\1":
            request, _ = decode_request_from_pb(pb.DecodeRequest.FromString(data[1:]))
        else:
            user = user_request_from_pb(pb.GenerateRequest.FromString(data[1:]))
            check_user_request(user)
            request = to_generate_request(user, user.prompt_ids or (1, 2, 3), request_id="r", seed=1, deadline_s=None)
    except DecodeError:
        return "no protobuf"  # the interceptor refuses it
    check_request(request, **limits, **known)  # type: ignore[arg-type]
    return "taken"


def _config(data: bytes, folder: Path) -> str:
    path = folder / ("c.toml" if data[:1] == b"\1" else "c.yaml")
    path.write_bytes(data[1:])
    config = ClusterConfig.load(path)
    config.worker_config("decode", 0)
    config.router_config()
    return "taken"


def _reason(error: PdspecError) -> str:
    """Why, without the values."""
    return f"{error.field} {_VALUES.sub('#', error.message)[:60]}"


@contextlib.contextmanager
def _alarm() -> Iterator[Callable[[float], None]]:
    """A timer that interrupts the main thread; elsewhere there is none, and a hang is a hang."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda seconds: None
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGPROF, ring)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds) and None  # type: ignore[func-returns-value]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
