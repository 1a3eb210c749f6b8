"""Frames: ordinary protobuf on the wire, strict on the way in, counted alike on both ends."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdspec.errors import Overloaded, TransferDamaged
from pdspec.transfer import frames
from pdspec.transfer.frames import parse_frame
from pdspec.transfer.ledger import Ledger
from pdspec.transfer.schema import Frame
from pdspec.transfer.wireformat import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, decode_frame, encode_frame
from pdspec.types import GenerateRequest, SamplingParams, TokenLogprob
from pdspec.wire import pdspec_pb2 as pb

REQUEST = GenerateRequest(
    request_id="r", prompt_ids=tuple(range(40)), sampling=SamplingParams(seed=2**63, temperature=0.8)
)
START = frames.DraftStart(
    epoch=3,
    seq=1,
    token_ids=np.array([5, 6], np.int32),
    log_q=np.array([-0.5, -1], np.float32),
    score=np.array([-0.25, -2], np.float32),
    rows={"hidden": np.arange(6, dtype=np.float32).reshape(2, 3), "none": np.zeros(0, np.float32)},
)
PAGES = frames.Pages(
    epoch=3, seq=0, group="target", layer=2, start=0, count=4, head_start=0, head_count=3, payload=b"k" * 96
)
EVERY_FRAME = [
    frames.Open(
        epoch=3,
        request=REQUEST,
        drafter="eagle3",
        draft_prefill="prefill",
        have_rows={"target": 16},
        fingerprint={"a": "b"},
    ),
    frames.Credit(epoch=3, bytes=1 << 20),
    frames.Landed(epoch=3, seq=4),
    frames.Begin(epoch=3, rows={"target": 40, "draft/0": 40}, fingerprint={"a": "b"}, worker_id="p0"),
    frames.Alive(epoch=3, steps=77),
    PAGES,
    frames.First(epoch=3, token_id=9, logprob=TokenLogprob(token_id=9, logprob=-0.5, top=((9, -0.5), (1, -2.0)))),
    frames.First(epoch=3, token_id=9),
    START,
    frames.HiddenRows(epoch=3, seq=2, start=0, count=2, dtype="float32", payload=b"h" * 24),
    frames.Done(
        epoch=3, bytes={"target": 96}, rows={"target": 4}, xxh3={"target": 2**64 - 1}, stats={"prefill_ms": 1.5}
    ),
    frames.ErrorFrame.of(3, Overloaded("full", retry_after_ms=250, field="pages", remedy="wait")),
]


def as_plain(frame: Frame) -> dict:
    plain = {}
    for field in dataclasses.fields(frame):  # type: ignore[arg-type]
        value = getattr(frame, field.name)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        elif isinstance(value, memoryview):
            value = bytes(value)
        elif isinstance(value, dict):
            value = {name: entry.tolist() if isinstance(entry, np.ndarray) else entry for name, entry in value.items()}
        plain[field.name] = value
    return plain


@pytest.mark.parametrize("frame", EVERY_FRAME, ids=lambda frame: frame.kind)
def test_round_trip(frame: Frame) -> None:
    back = parse_frame(frame.to_bytes())
    assert type(back) is type(frame) and as_plain(back) == as_plain(frame)


def test_every_kind_is_covered() -> None:
    assert {frame.kind for frame in EVERY_FRAME} == set(Frame.kinds)


@given(st.dictionaries(st.text(max_size=8), st.integers(0, 2**63), max_size=4), st.binary(max_size=400))
def test_bytes_are_the_protobuf_message(header: dict, payload: bytes) -> None:
    data = encode_frame(header, payload)
    message = pb.PrefillFrame.FromString(data)
    assert message.payload == payload and message.SerializeToString() == data
    assert decode_frame(message.SerializeToString()) == (header, memoryview(payload))
    assert not payload or decode_frame(memoryview(data))[1].obj is data  # a view, not a copy


def test_protobuf_written_by_others_is_read() -> None:
    header = encode_frame({"kind": "x"})[2:]
    assert decode_frame(pb.PrefillFrame(header=header, payload=b"z" * 300).SerializeToString()) == (
        {"kind": "x"},
        b"z" * 300,
    )


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_damage_and_never_a_crash(data: bytes) -> None:
    with pytest.raises(TransferDamaged):
        parse_frame(data)


@settings(max_examples=400)
@given(st.sampled_from(EVERY_FRAME), st.data())
def test_broken_frames_are_damage_or_still_typed(frame: Frame, data: st.DataObject) -> None:
    raw = bytearray(frame.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(1, len(raw))) :]
    try:
        parsed = parse_frame(bytes(raw))
    except TransferDamaged:
        return
    assert isinstance(parsed, Frame) and parsed.kind in Frame.kinds


def test_another_first_token_than_was_sent_is_damage() -> None:
    sent = frames.First(epoch=3, token_id=9)
    header, payload = sent.pack()
    for change in ({"token_id": 8}, {"epoch": 4}, {"check": header["check"] ^ 1}, {"logprob": [-0.5, []]}):
        with pytest.raises(TransferDamaged, match="check"):
            parse_frame(encode_frame({**header, **change}, payload))
    del header["check"]
    with pytest.raises(TransferDamaged, match="check"):
        parse_frame(encode_frame(header, payload))


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"kind": "nonsense", "epoch": 1}, "frame.kind"),
        ({"epoch": 1, "kind": "credit", "bytes": 1}, "frame.kind"),
        ({"kind": "credit", "bytes": 1}, "credit.epoch"),
        ({"kind": "credit", "epoch": True, "bytes": 1}, "credit.epoch"),
        ({"kind": "credit", "epoch": 1, "bytes": -1}, "credit.bytes"),
        ({"kind": "credit", "epoch": 1, "bytes": 1.0}, "credit.bytes"),
        ({"kind": "credit", "epoch": 1, "bytes": 1, "more": 2}, "credit.more"),
        ({"kind": "first", "epoch": 1, "token_id": 2**31}, "first.token_id"),
        ({"kind": "first", "epoch": 1, "token_id": 1, "logprob": ["a"]}, "first.logprob"),
        ({"kind": "begin", "epoch": 1, "rows": {"target": "many"}}, "begin.rows"),
        ({"kind": "done", "epoch": 1, "bytes": {}, "rows": {}, "xxh3": {"t": -1}}, "done.xxh3"),
        ({"kind": "done", "epoch": 1, "bytes": {}, "rows": {}, "xxh3": {}, "stats": {"a": float("nan")}}, "done.stats"),
        (
            {"kind": "draft_start", "epoch": 1, "seq": 0, "token_ids": b"123", "log_q": b"", "score": b""},
            "draft_start.token_ids",
        ),
    ],
)
def test_strict_fields(header: dict, field: str) -> None:
    if header["kind"] == "draft_start":
        header = header | {"rows": {}}
    with pytest.raises(TransferDamaged) as caught:
        parse_frame(encode_frame(header))
    assert caught.value.field == field


def test_sizes_are_bounded_both_ways() -> None:
    with pytest.raises(TransferDamaged, match="header"):
        encode_frame({"x": b"0" * MAX_HEADER_BYTES})
    with pytest.raises(TransferDamaged, match="payload"):
        encode_frame({}, bytes(MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(TransferDamaged, match="header"):
        decode_frame(pb.PrefillFrame(header=bytes(MAX_HEADER_BYTES + 1)).SerializeToString())
    with pytest.raises(TransferDamaged, match="cut short"):
        decode_frame(b"\x12\xff\xff\xff\xff\x0f")


def test_payload_in_a_frame_without_one_is_damage() -> None:
    with pytest.raises(TransferDamaged):
        parse_frame(encode_frame({"kind": "credit", "epoch": 1, "bytes": 1}, b"x"))


def test_error_frame_keeps_the_typed_error() -> None:
    error = EVERY_FRAME[-1].to_error()  # type: ignore[attr-defined]
    assert isinstance(error, Overloaded) and (error.retry_after_ms, error.field, error.remedy) == (250, "pages", "wait")


def pages(
    seq: int, layer: int, start: int, count: int, head: int = 0, heads: int = 2, fill: bytes = b"a"
) -> frames.Pages:
    return frames.Pages(
        epoch=1,
        seq=seq,
        group="target",
        layer=layer,
        start=start,
        count=count,
        head_start=head,
        head_count=heads,
        payload=fill * count,
    )


def test_ledgers_agree_after_the_wire() -> None:
    sender, receiver = Ledger(1), Ledger(1)
    start = dataclasses.replace(START, epoch=1, seq=2)
    hidden = frames.HiddenRows(epoch=1, seq=3, start=0, count=2, dtype="float32", payload=b"h" * 24)
    for frame in (pages(0, 0, 0, 4), pages(1, 1, 0, 4), start, hidden):
        sender.add(frame)
        receiver.add(parse_frame(frame.to_bytes()))  # type: ignore[arg-type]
    done = parse_frame(sender.done({"prefill_ms": 2.0}).to_bytes())
    receiver.check(done)  # type: ignore[arg-type]
    assert done.rows == {"target": 8, "draft_start": 1, "hidden": 2}  # type: ignore[attr-defined]
    receiver.check_covered("target", layers=2, heads=2, start=0, stop=4)


@pytest.mark.parametrize(
    "sent",
    [pages(0, 0, 0, 4, fill=b"b"), pages(0, 1, 0, 4), pages(0, 0, 1, 4), pages(0, 0, 0, 5), pages(0, 0, 0, 4, head=1)],
    ids=["payload", "layer", "start", "count", "head"],
)
def test_any_difference_shows_at_done(sent: frames.Pages) -> None:
    sender, receiver = Ledger(1), Ledger(1)
    sender.add(sent)
    receiver.add(pages(0, 0, 0, 4))
    with pytest.raises(TransferDamaged, match=r"done\.target"):
        receiver.check(sender.done())
    assert set(receiver.damaged(sender.done())) == {"target"}


def test_a_missing_group_shows_at_done() -> None:
    sender, receiver = Ledger(1), Ledger(1)
    sender.add(pages(0, 0, 0, 4))
    assert "sent 4, received None" in receiver.damaged(sender.done())["target"]


@pytest.mark.parametrize("seq", [0, 2])
def test_repeated_and_skipped_frames_are_damage(seq: int) -> None:
    ledger = Ledger(1)
    ledger.add(pages(0, 0, 0, 4))
    with pytest.raises(TransferDamaged, match=r"pages\.seq"):
        ledger.add(pages(seq, 0, 4, 4))


def test_rows_must_continue_and_cover() -> None:
    ledger = Ledger(1)
    ledger.add(pages(0, 0, 0, 4, head=0, heads=1))
    with pytest.raises(TransferDamaged, match="4 was due"):
        ledger.add(pages(1, 0, 5, 1, head=0, heads=1))
    with pytest.raises(TransferDamaged, match="lacks rows"):
        ledger.check_covered("target", layers=1, heads=2, start=0, stop=4)


def test_head_ranges_may_come_in_parts() -> None:
    ledger = Ledger(1)
    for seq, (head, start) in enumerate([(1, 0), (0, 0), (0, 2), (1, 2)]):
        ledger.add(pages(seq, 0, start, 2, head=head, heads=1))
    ledger.check_covered("target", layers=1, heads=2, start=0, stop=4)
    ledger.check_covered("draft/0", layers=1, heads=2, start=3, stop=3)


def test_other_epochs_are_dropped_and_counted() -> None:
    ledger = Ledger(2)
    assert not ledger.admit(1) and ledger.admit(2) and ledger.dropped == 1
