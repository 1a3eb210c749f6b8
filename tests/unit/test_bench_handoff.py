"""The arithmetic of the handoff's benchmarks, and their streams over every path."""

from __future__ import annotations

import pytest

from pdspec.cli.options import numbers
from pdspec.config import WorkerConfig
from pdspec.errors import InvalidRequest
from pdspec.study import bench_handoff, bench_stream
from pdspec.study.decode_steps import _within
from pdspec.study.processes import cpu_seconds
from pdspec.study.replay import Wish
from pdspec.types import CacheGroup

GROUP = CacheGroup(name="target", num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")


@pytest.mark.parametrize(("length", "rows"), [(512, 512), (513, 1), (2048, 512), (700, 188)])
def test_the_allowance_is_that_of_the_last_layer_of_the_last_chunk(length, rows):
    found = {"grpc": [{"exposed_ms": 9.0, "prefill_ms": 1.0, "bytes": 1.0}] * 3}
    row = bench_handoff._exposed(length, 512, GROUP, found, {"grpc": 1e8})["grpc"]
    assert row["last_layer_bytes"] == rows * 768
    assert row["allowed_ms"] == pytest.approx(2 * rows * 768 / 1e5 + 5)
    assert row["of_allowed"] == pytest.approx(9.0 / row["allowed_ms"])


def test_a_throttled_link_is_judged_by_its_own_transfer():
    slow = {"relay": [{"exposed_ms": float(ms), "prefill_ms": 200.0, "bytes": 1e6} for ms in (3, 5, 40)]}
    result = bench_handoff._throttled(2048, 1e7, 1e6, slow)
    assert result["transfer_ms"] == pytest.approx(100)
    assert result["paths"]["relay"]["of_transfer"] == pytest.approx(0.05)


def test_steps_count_only_where_they_lie_whole_within_a_window():
    arrived = [0.0, 1.0, 2.0, 3.0, 5.0, 6.0]
    windows = [(False, 0.5, 3.5), (True, 4.0, 6.0), (True, 0.0, 1.0)]
    assert _within(arrived, windows, False) == [1000.0, 1000.0]
    assert _within(arrived, windows, True) == [1000.0, 1000.0]


def test_a_wish_survives_its_way_as_a_request_id():
    wish = Wish(seconds=0.25, raw_bytes=7)
    assert Wish.of(wish.text) == wish and Wish.of(Wish().text) == Wish()


def test_lengths_are_numbers_or_refused_by_name():
    assert numbers("512, 2048", "lengths") == [512, 2048]
    with pytest.raises(InvalidRequest, match="lengths"):
        numbers("512,many", "lengths")


def test_streams_over_every_path_carry_what_they_should():
    """Two processes beside this one; what is measured is not the point, what is moved is."""
    with bench_stream.receiver(WorkerConfig(model="tiny"), 600) as here:
        before = cpu_seconds(here.sender.pid)
        found = bench_stream.measure(here, 6 << 20, 1)
        assert here.offers["shm"].counts["handoffs_shm"] == 4 and here.offers["grpc"].counts["handoffs_grpc"] == 4
        assert cpu_seconds(here.sender.pid) > before
        size = 600 * here.group.num_layers * here.group.row_bytes
        for path, kinds in found.items():
            assert kinds["raw"]["bytes"] == 6 << 20 and kinds["handoff"]["bytes"] == size
            processes = {"prefill", "decode", *(["relay"] if path == "relay" else [])}
            assert set(kinds["raw"]["cpu_seconds_of"]) == processes
        sent = here.cache.group("target")
        assert sent[:, : 600 // 16].abs().sum(dim=(1, 2, 3, 4, 5)).gt(0).all()  # rows of every layer have landed
