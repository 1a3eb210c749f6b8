"""Inputs of ``pdspec chaos fuzz``: valid ones of each kind, and seeded ways to break them.

Bytes are flipped, cut, doubled, moved and spliced; headers of frames and fields of requests and settings are also
broken one by one, so that what gets past the first check meets the next.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np

from pdspec.config import ClusterConfig
from pdspec.errors import Overloaded
from pdspec.transfer import frames
from pdspec.transfer.wireformat import decode_message, encode_message, frame_parts
from pdspec.types import GenerateRequest, Route, SamplingParams, TokenLogprob, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.codec import decode_request_to_pb, user_request_to_pb

_NUMBERS = (0, 1, -1, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), -1.5, 0.5)
_TEXTS = (
    "",
    "x",
    "target",
    "none",
    "\x00",
    "ü" * 40,
    "a" * 5000,
    "chain(4)",
    "static(" + "1x" * 200 + ")",
    "-",
    "../x",
)
_YAML_TRAPS = (
    "a: 2001-99-99\n", "a: " + "[" * 3000, "&a [*a, *a]\n",
    "model: &x [" + "1," * 50 + "]\nworker: {model: [*x, *x]}\n",
    "a: !!python/object:os.system x\n", "? [1, 2]\n: 3\n", "port: " + "9" * 5000 + "\n", "\ufeffport: 1\n",
    "a: 1\na: 2\n",
    "model: " + "".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}, " for i in range(9)) + "]" * 9,
    "worker: {tls: {cert: 3}}\n", "worker: {tls: [1]}\n", "router: null\n", "- 1\n- 2\n", "heads: {1: 2}\n", "tls: x\n",
)  # fmt: skip


class Mutator:
    """Seeded; ``corpus`` grows by what ``keep`` is given."""

    def __init__(self, seed: int, corpus: Sequence[bytes], structured: Callable[[random.Random], bytes]) -> None:
        self._random = random.Random(seed)
        self._corpus, self._structured = list(corpus), structured
        self._valid = len(self._corpus)

    def next(self) -> bytes:
        """A valid input, broken in one to four ways, or one made field by field."""
        if self._random.random() < 0.4:
            data = self._structured(self._random)
            if self._random.random() < 0.7:
                return data
        else:
            data = self._random.choice(self._corpus)
        for _ in range(self._random.choice((1, 1, 2, 4))):
            data = self._mutate(data)
        return data

    def keep(self, data: bytes) -> None:
        """An input that did something new: more is made of it."""
        if len(data) < 1 << 16:
            self._corpus.append(data)
            if len(self._corpus) > self._valid + 512:
                del self._corpus[self._valid]

    def _mutate(self, data: bytes) -> bytes:
        pick, size = self._random, len(data)
        at, stop = sorted((pick.randint(0, size), pick.randint(0, size)))
        match pick.randrange(9):
            case 0 if size:
                spot = pick.randrange(size)
                return data[:spot] + bytes((data[spot] ^ 1 << pick.randrange(8),)) + data[spot + 1 :]
            case 1:
                return data[:at] + pick.randbytes(pick.randint(1, 8)) + data[at:]
            case 2:
                return data[:at] + data[stop:]
            case 3:
                return data[:stop] + data[at:]  # doubled
            case 4:
                return data[:at]
            case 5:
                other = pick.choice(self._corpus)
                return data[:at] + other[pick.randint(0, len(other)) :]
            case 6:
                return data[:at] + pick.choice(_NUMBERS).to_bytes(9, "little", signed=True)[: stop - at] + data[stop:]
            case 7:
                return data[:at] + pick.choice((b"\xff", b"\x00", b"\x80", b"\xc1")) * (stop - at) + data[stop:]
        return data[:at] + data[at:stop][::-1] + data[stop:]


def frame_corpus() -> list[bytes]:
    """One valid frame of each kind, and more."""
    ids, floats = np.array([5, 6], np.int32), np.array([-0.5, -1], np.float32)
    every = [
        frames.Open(epoch=3, request=_request(), drafter="eagle3", draft_prefill="prefill", have_rows={"target": 16},
                    fingerprint={"a": "b"}),
        frames.Credit(epoch=3, bytes=1 << 20),
        frames.Landed(epoch=3, seq=4),
        frames.Begin(epoch=3, rows={"target": 40, "draft/0": 40}, fingerprint={"a": "b"}, worker_id="p0"),
        frames.Alive(epoch=3, steps=77),
        frames.Pages(epoch=3, seq=0, group="target", layer=2, start=0, count=4, head_start=0, head_count=3,
                     payload=b"k" * 96),
        frames.First(epoch=3, token_id=9, logprob=TokenLogprob(token_id=9, logprob=-0.5, top=((9, -0.5), (1, -2.0)))),
        frames.First(epoch=3, token_id=9),
        frames.DraftStart(epoch=3, seq=1, token_ids=ids, log_q=floats, score=floats,
                          rows={"hidden": np.arange(6, dtype=np.float32).reshape(2, 3)}),
        frames.HiddenRows(epoch=3, seq=2, start=0, count=2, dtype="float32", payload=b"h" * 24),
        frames.Done(epoch=3, bytes={"target": 96}, rows={"target": 4}, xxh3={"target": 2**64 - 1}, stats={"ms": 1.5}),
        frames.ErrorFrame.of(3, Overloaded("full", retry_after_ms=250, field="pages", remedy="wait")),
    ]  # fmt: skip
    together = encode_message([frame_parts(*frame.pack()) for frame in every[3:7]])
    return [*(frame.to_bytes() for frame in every), together]


def odd_frame(pick: random.Random) -> bytes:
    """A valid frame whose header has fields of other values, types and names."""
    header, payload = pick.choice(decode_message(pick.choice(_FRAMES)))
    for _ in range(pick.randint(1, 3)):
        match pick.randrange(6):
            case 0:
                header.pop(pick.choice(list(header)), None)
                if not header:
                    break
            case 1:
                header[pick.choice(_TEXTS)] = odd_value(pick)
            case 2:
                header["kind"] = pick.choice(("pages", "done", "first", "open", "draft_start", "credit", "nothing"))
            case _:
                header[pick.choice(list(header) or ["kind"])] = odd_value(pick)
    head = msgpack.packb(header, use_bin_type=True, default=str)
    body = bytes(payload) if pick.random() < 0.8 else pick.randbytes(pick.randint(0, 200))
    return b"\x0a" + _varint(len(head)) + head + (b"\x12" + _varint(len(body)) + body if body else b"")


def request_corpus() -> list[bytes]:
    """Valid messages of Router/Generate (first byte 0) and DecodeWorker/Decode (1)."""
    sampling = SamplingParams(
        temperature=0.8, top_p=0.9, top_k=40, seed=7, max_tokens=20, stop_strings=("x", "yz"), stop_ids=(3,),
        logit_bias=((4, 1.5),), allowed_ids=(1, 2), banned_ids=(5,), logprobs=2,
    )  # fmt: skip
    users = [
        UserRequest(text="Hello", sampling=sampling, drafter="eagle3", tree="dynamic(4,4,8)", handoff="relay"),
        UserRequest(chat=(("system", "Be brief."), ("user", "Hi")), sampling=SamplingParams(max_tokens=5)),
        UserRequest(prompt_ids=tuple(range(64)), sampling=SamplingParams(verify="block"), tree="static(2x2x1)"),
    ]
    decode = decode_request_to_pb(_request(), Route(decode="a:1", prefill=("b:2", "c:3")))
    return [
        *(b"\0" + user_request_to_pb(user).SerializeToString() for user in users),
        b"\1" + decode.SerializeToString(),
    ]


def odd_request(pick: random.Random) -> bytes:
    """A valid message whose scalar fields have other values."""
    data = pick.choice(_REQUESTS)
    whole: Any = pb.DecodeRequest if data[0] else pb.GenerateRequest
    message = whole.FromString(data[1:])
    inner = pick.choice([message.request, message.request.sampling] if data[0] else [message, message.sampling])
    for _ in range(pick.randint(1, 3)):
        field = pick.choice(inner.DESCRIPTOR.fields)
        try:
            setattr(inner, field.name, odd_value(pick))
        except (TypeError, ValueError, AttributeError, OverflowError):  # no such value on the wire
            continue
    return data[:1] + message.SerializeToString()


def config_corpus() -> list[bytes]:
    """Valid settings of a cluster as JSON, YAML and TOML (first byte 0, 0, 1), and known traps."""
    whole = ClusterConfig().to_mapping()
    toml = b'decode = 3\n[worker]\nmodel = "tiny"\nheads = {eagle3 = "random:0"}\n[router]\nport = 0\n'
    yaml = b"decode: 3\nworker:\n  model: tiny\n  drafters: [none, ngram]\n  drafter: ngram\nrouter: {port: 0}\n"
    return [b"\0" + json.dumps(whole).encode(), b"\0" + yaml, b"\1" + toml,
            *(b"\0" + trap.encode("utf-8", "surrogatepass") for trap in _YAML_TRAPS)]  # fmt: skip


def odd_config(pick: random.Random) -> bytes:
    """Settings with some values and names changed, as JSON."""
    whole: dict[Any, Any] = ClusterConfig().to_mapping()
    for _ in range(pick.randint(1, 3)):
        section = (
            whole if pick.random() < 0.3 else whole.get(pick.choice(("worker", "router", "prefill_worker")), whole)
        )
        if not isinstance(section, dict):
            continue
        name = pick.choice(_TEXTS[:5]) if not section or pick.random() < 0.2 else pick.choice(list(section))
        section[name] = odd_value(pick)
    return b"\0" + json.dumps(whole, default=str).encode("utf-8", "surrogatepass")


def odd_value(pick: random.Random, depth: int = 0) -> Any:
    """Some value of some type."""
    match pick.randrange(9 if depth < 3 else 6):
        case 0:
            return pick.choice(_NUMBERS)
        case 1:
            return pick.choice(_FLOATS)
        case 2:
            return pick.choice(_TEXTS)
        case 3:
            return pick.randbytes(pick.randint(0, 40))
        case 4:
            return pick.choice((None, True, False))
        case 5:
            return -pick.getrandbits(pick.randint(1, 63))
        case 6:
            return [odd_value(pick, depth + 1) for _ in range(pick.randint(0, 4))]
    return {pick.choice(_TEXTS[:6]): odd_value(pick, depth + 1) for _ in range(pick.randint(0, 4))}


def _request() -> GenerateRequest:
    return GenerateRequest(
        request_id="r", prompt_ids=tuple(range(40)), sampling=SamplingParams(seed=1, temperature=0.8)
    )


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes((value & 0x7F | 0x80,)), value >> 7
    return out + bytes((value,))


_FRAMES, _REQUESTS = tuple(frame_corpus()), tuple(request_corpus())
