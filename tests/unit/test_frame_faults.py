"""Damage on purpose is damage: whatever it does to a stream of data frames, the ledger or the parser finds it."""

from __future__ import annotations

import pytest

from pdspec.errors import ConfigError, TransferDamaged
from pdspec.transfer.faults import KINDS, FrameFaults
from pdspec.transfer.frames import Done, First, Pages, parse_frame
from pdspec.transfer.ledger import Ledger

EPOCH = 7


def frames(sender: Ledger) -> list:
    found = []
    for layer in range(4):
        page = Pages(
            epoch=EPOCH, seq=sender.next_seq(), group="target", layer=layer, start=0, count=3, head_start=0,
            head_count=2, payload=bytes(range(96)),
        )  # fmt: skip
        sender.add(page)
        found.append(page)
    return [*found, First(epoch=EPOCH, token_id=5), sender.done()]


def received(faults: FrameFaults) -> str:
    """What the receiver finds wrong, empty when nothing."""
    ledger = Ledger(EPOCH)
    try:
        for frame in frames(Ledger(EPOCH)):
            for data in faults.apply(frame, frame.to_bytes()):
                got = parse_frame(data)
                if not ledger.admit(got.epoch):
                    continue
                if isinstance(got, Pages):
                    ledger.add(got)
                if isinstance(got, Done):
                    ledger.check(got)
                    ledger.check_covered("target", layers=4, heads=2, start=0, stop=3)
    except TransferDamaged as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_found(kind: str) -> None:
    for seed in range(60):
        faults = FrameFaults({kind: 0.3}, seed=seed)
        assert bool(received(faults)) == bool(faults.counts), (seed, faults.counts)
    assert received(FrameFaults({kind: 1.0}, seed=1))


def test_without_a_chance_nothing_happens() -> None:
    faults = FrameFaults({"flip": 0.0})
    assert not received(faults) and not faults.counts


@pytest.mark.parametrize("chances", [{"burn": 0.1}, {"flip": 1.5}])
def test_unknown_damage_is_refused(chances: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="frame_faults"):
        FrameFaults(chances)
