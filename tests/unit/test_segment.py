"""Shared memory between two workers: proven to be the same, used by one at a time, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdspec.errors import Incompatible, PeerLost, TransferDamaged
from pdspec.transfer.frames import Begin
from pdspec.transfer.pace import Pace
from pdspec.transfer.segment import FOLDER, Segment, sweep
from pdspec.transfer.shm_serve import OWN, Lane, Lanes, Slots
from pdspec.transfer.shm_stream import Offers

SMALL = partial(Segment.create, slots=3, slot_bytes=100)
CREATOR = """
import sys, time
from pathlib import Path
from pdspec.transfer.segment import Segment
segment = Segment.create(Path(sys.argv[1]), slots=3, slot_bytes=100)
print(segment.offer, flush=True)
time.sleep(60)
"""


@pytest.fixture
def orphan(tmp_path: Path):
    """A process with a segment in ``tmp_path``."""
    command = [sys.executable, "-c", CREATOR, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process, process.stdout.readline().strip()
        process.kill()


def test_what_one_side_writes_the_other_reads(tmp_path):
    mine = Segment.create(tmp_path, slots=3, slot_bytes=100)
    theirs = Segment.attach(mine.offer, tmp_path)
    mine.unlink()
    assert not list(tmp_path.iterdir())
    theirs.slot(2)[:5] = np.frombuffer(b"hello", np.uint8)
    place = theirs.place(2, 5)
    assert mine.view(place) == b"hello" and mine.view(place).readonly
    assert not mine.slot(0).any() and not mine.slot(1).any()
    assert theirs.creator_lives()
    mine.close()
    assert not theirs.creator_lives()


def test_a_segment_that_nobody_holds_any_more_takes_its_name_along(tmp_path):
    segment = Segment.create(tmp_path, slots=3, slot_bytes=100)
    theirs = Segment.attach(segment.offer, tmp_path)
    del segment
    assert not theirs.creator_lives() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda offer, path: offer[:-1] + ("0" if offer[-1] != "0" else "1"),
        lambda offer, path: "../" + offer,
        lambda offer, path: "",
        lambda offer, path: "x" * 10_000,
        lambda offer, path: offer.partition(":")[0] + ":é",
        lambda offer, path: (os.truncate(path, 4096 + 299), offer)[1],
        lambda offer, path: (os.truncate(path, 10), offer)[1],
        lambda offer, path: (os.pwrite(os.open(path, os.O_RDWR), b"X", 0), offer)[1],
        lambda offer, path: (path.unlink(), offer)[1],
        lambda offer, path: (path.unlink(), path.symlink_to("/etc/hostname"), offer)[2],
    ],
)
def test_another_segment_is_not_taken_for_the_offered_one(tmp_path, spoil):
    segment = Segment.create(tmp_path, slots=3, slot_bytes=100)
    with pytest.raises((OSError, ValueError)):
        Segment.attach(spoil(segment.offer, segment.path), tmp_path)


@pytest.mark.parametrize(
    "place", [[300, 1], [-100, 1], [50, 1], [0, 0], [0, -1], [0, 101], [0], [0, 1, 2], "ab", None, [0.0, 1], [True, 1]]
)
def test_a_place_outside_of_the_slots_is_damage(tmp_path, place):
    segment = Segment.create(tmp_path, slots=3, slot_bytes=100)
    with pytest.raises(TransferDamaged, match="no place"):
        segment.view(place)


def test_no_room_in_the_folder_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match="No"):
        Segment.create(FOLDER, slots=1 << 10, slot_bytes=1 << 40)
    with pytest.raises(OSError, match="No"):
        Segment.create(tmp_path / "absent")


def test_the_segment_of_a_dead_process_is_noticed_and_swept(tmp_path, orphan):
    process, offer = orphan
    attached = Segment.attach(offer, tmp_path)
    past = time.time() - 60
    os.utime(attached.path, (past, past))
    assert attached.creator_lives() and sweep(tmp_path) == 0 and attached.path.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.utime(attached.path)
    assert not attached.creator_lives() and sweep(tmp_path) == 0  # too young to judge
    os.utime(attached.path, (past, past))
    other = tmp_path / "pdspec-notes"
    other.write_text("a file of someone's")
    assert sweep(tmp_path) == 1 and list(tmp_path.iterdir()) == [other]


# --- slots -----------------------------------------------------------------------------------------------------------


def lane(slots: Slots, stall_timeout_s: float = 0.2) -> Lane:
    return Lane(slots, stall_timeout_s=stall_timeout_s)


def test_a_slot_is_used_again_only_after_it_landed_or_its_stream_ended():
    async def scenario() -> None:
        segment = Segment.create(slots=OWN + 1, slot_bytes=100)
        segment.unlink()
        slots = Slots(segment)
        one, two = lane(slots), lane(slots)
        parts = (memoryview(b"a" * 40), memoryview(b"b" * 60))
        first = await one.place(0, parts)
        assert segment.view(first) == b"".join(parts)
        later = [await one.place(seq, bytes([seq])) for seq in range(1, OWN)]
        other = await two.place(0, b"d")
        assert len({place[0] for place in (first, *later, other)}) == OWN + 1 and slots.free == 0
        assert await two.place(1, b"e") is None  # it holds one only, which may be long in landing
        waiting = asyncio.ensure_future(one.place(OWN, b"f"))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert one.landed(0) == 100
        assert (await waiting)[0] == first[0] and segment.view(later[0]) == b"\1"
        with pytest.raises(PeerLost, match="no slot"):
            await one.place(OWN + 1, b"g")
        one.close()
        assert slots.free == OWN and one.landed(99) == 0
        two.close()
        assert slots.free == OWN + 1
        assert await two.place(5, b"x" * 101) is None and await two.place(5, b"") is None

    asyncio.run(scenario())


def test_lanes_refuse_with_a_reason_and_forget_the_dead(orphan, monkeypatch, tmp_path):
    process, offer = orphan
    monkeypatch.setattr(Segment, "attach", partial(Segment.attach, folder=tmp_path))
    lanes = Lanes("auto")
    assert lanes.lane("", stall_timeout_s=1) == (None, "")
    assert "cannot map" in lanes.lane("pdspec-" + "0" * 32 + ":" + "0" * 32, stall_timeout_s=1)[1]
    taken, reason = lanes.lane(offer, stall_timeout_s=1)
    assert taken and not reason and lanes.counts == {"handoffs_shm": 1, "handoffs_grpc": 2}
    (tmp_path / offer.partition(":")[0]).unlink()
    assert lanes.lane(offer, stall_timeout_s=1)[0]  # mapped already: the name is not needed
    process.kill()
    process.wait()
    assert "cannot map" in lanes.lane(offer, stall_timeout_s=1)[1]
    assert "mover is grpc" in Lanes("grpc").lane(offer, stall_timeout_s=1)[1]


# --- offers ----------------------------------------------------------------------------------------------------------


def begin(mover: str, refused: str = "") -> Begin:
    return Begin(epoch=0, rows={}, mover=mover, refused=refused)


def test_one_segment_per_peer_whose_name_goes_once_it_is_mapped():
    async def scenario() -> None:
        offers = Offers("auto", SMALL)
        one, again, other = await offers.offer("a"), await offers.offer("a"), await offers.offer("b")
        assert one.segment is again.segment and one.segment is not other.segment
        with pytest.raises(TransferDamaged, match="not shared"):
            one.view([0, 1])
        one.begun(begin("shm"))
        assert one.view([0, 1]) == b"\0" and not one.segment.path.exists()
        one.ended()
        again.ended()  # its stream ended before Begin: the segment is in use all the same
        assert (await offers.offer("a")).segment is one.segment
        other.ended()
        assert not other.segment.path.exists() and (await offers.offer("b")).segment is not other.segment
        offers.close()

    asyncio.run(scenario())


def test_a_refusal_is_said_once_and_counted_and_the_offer_not_repeated(caplog):
    async def scenario() -> None:
        offers = Offers("auto", SMALL)
        offer = await offers.offer("a")
        offer.begun(begin("grpc", "another host"))
        assert not offer.segment.path.exists()
        again = await offers.offer("a")
        again.begun(begin("grpc"))
        assert again.text == "" and offers.counts == {"handoffs_shm": 0, "handoffs_grpc": 2, "mover_fallbacks": 2}
        assert [record.message for record in caplog.records if "another host" in record.message]
        assert len(caplog.records) == 1
        with pytest.raises(TransferDamaged, match="not offered"):
            (await offers.offer("a")).begun(begin("shm"))

    asyncio.run(scenario())


def test_a_peer_that_started_anew_gets_another_segment():
    async def scenario() -> None:
        offers = Offers("auto", SMALL)
        offer = await offers.offer("a")
        offer.begun(begin("shm"))
        later = await offers.offer("a")
        later.begun(begin("grpc", "cannot map"))
        fresh = await offers.offer("a")
        assert fresh.segment not in (None, offer.segment) and offers.counts["mover_fallbacks"] == 1
        fresh.begun(begin("shm"))
        fresh.ended()
        assert (await offers.offer("a")).segment is fresh.segment
        fresh.ended(lost=True)
        assert (await offers.offer("a")).segment is not fresh.segment
        offers.close()

    asyncio.run(scenario())


def test_shm_demanded_is_shm_or_a_refusal():
    def full() -> Any:
        raise OSError("No space left on device")

    async def scenario() -> None:
        with pytest.raises(Incompatible, match="must hand over through shared memory"):
            (await Offers("shm", SMALL).offer("a")).begun(begin("grpc", "another host"))
        with pytest.raises(Incompatible, match="No space"):
            await Offers("shm", full).offer("a")
        spilled = Offers("auto", full)
        assert (await spilled.offer("a")).text == "" and spilled.counts["mover_fallbacks"] == 1
        silent = Offers("grpc", full)
        assert (await silent.offer("a")).text == "" and silent.counts["mover_fallbacks"] == 0

    asyncio.run(scenario())


def test_a_limited_link_passes_bytes_at_its_rate():
    async def scenario() -> float:
        pace, began = Pace(1e6), time.perf_counter()
        await asyncio.gather(*(pace.take(20_000) for _ in range(5)))
        await Pace(0).take(10**12)
        return time.perf_counter() - began

    assert asyncio.run(scenario()) >= 0.1
