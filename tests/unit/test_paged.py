import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdspec.cache.paged import PagedCache
from pdspec.types import CacheGroup

TARGET = CacheGroup(name="target", num_layers=3, num_kv_heads=4, head_dim=2, dtype="bfloat16")
DRAFT = CacheGroup(name="draft/0", num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")


def filled() -> PagedCache:
    cache = PagedCache((TARGET, DRAFT), num_pages=6, page_size=4)
    generator = torch.Generator().manual_seed(1)
    for name in ("target", "draft/0"):
        cache.group(name).copy_(torch.randn(cache.group(name).shape, generator=generator))
    return cache


def logical(cache: PagedCache, group: str, layer: int, pages: list[int]) -> torch.Tensor:
    """[rows, 2, heads, dim] of a sequence, gathered page by page."""
    return torch.cat([cache.group(group)[layer, page] for page in pages])


def as_bytes(rows: torch.Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


def test_starts_zeroed_aligned_and_shaped():
    cache = PagedCache((TARGET, DRAFT), num_pages=6, page_size=4)
    assert cache.group("target").shape == (3, 6, 4, 2, 4, 2)
    assert cache.group("target").dtype == torch.bfloat16
    assert cache.group("draft/0").dtype == torch.float32
    assert not cache.group("target").any()
    assert cache.group("target").data_ptr() % 64 == 0
    assert cache.nbytes == 6 * 4 * (3 * TARGET.row_bytes + DRAFT.row_bytes)


def test_groups_need_distinct_names():
    with pytest.raises(ValueError, match="distinct"):
        PagedCache((TARGET, TARGET), num_pages=1, page_size=4)


@settings(max_examples=80, deadline=None)
@given(
    st.permutations(range(6)), st.integers(1, 6), st.data(),
    st.sampled_from([("target", 2, 4), ("draft/0", 0, 2)]),
)
def test_read_and_write_follow_the_pages(order, count, data, where):
    group, layer, num_heads = where
    pages = list(order[:count])
    start = data.draw(st.integers(0, count * 4))
    stop = data.draw(st.integers(start, count * 4))
    head = data.draw(st.integers(0, num_heads - 1))
    heads = data.draw(st.integers(1, num_heads - head))
    cache = filled()
    wanted = logical(cache, group, layer, pages)[start:stop]
    assert cache.read_rows(group, layer, pages, start, stop) == as_bytes(wanted)
    part = cache.read_rows(group, layer, pages, start, stop, head, heads)
    assert part == as_bytes(wanted[:, :, head : head + heads])

    other = PagedCache((TARGET, DRAFT), num_pages=6, page_size=4)
    other.write_rows(group, layer, pages, start, stop, memoryview(part), head, heads)
    expected = torch.zeros_like(logical(cache, group, layer, pages))
    expected[start:stop, :, head : head + heads] = wanted[:, :, head : head + heads]
    assert torch.equal(logical(other, group, layer, pages), expected)
    other.write_rows(group, layer, pages, start, stop, cache.read_rows(group, layer, pages, start, stop))
    assert torch.equal(logical(other, group, layer, pages)[start:stop], wanted)


def test_page_sizes_may_differ_between_the_ends():
    source, target = filled(), PagedCache((TARGET, DRAFT), num_pages=4, page_size=6)
    rows = source.read_rows("target", 1, [5, 0, 3], 1, 11)
    target.write_rows("target", 1, [2, 1], 1, 11, rows)
    assert target.read_rows("target", 1, [2, 1], 1, 11) == rows


@pytest.mark.parametrize("call", [
    lambda cache: cache.read_rows("target", 0, [0], 0, 5),
    lambda cache: cache.read_rows("target", 0, [0], -1, 2),
    lambda cache: cache.read_rows("target", 0, [6], 0, 1),
    lambda cache: cache.read_rows("target", 0, [0], 0, 1, 3, 2),
    lambda cache: cache.copy_rows("target", [0], [4], [0]),
    lambda cache: cache.poison("target", [0], 2, 5),
])
def test_rows_heads_and_pages_that_are_not_there(call):
    with pytest.raises(IndexError):
        call(filled())


def test_wrong_length_is_refused_before_writing():
    cache = filled()
    before = cache.group("target").clone()
    with pytest.raises(ValueError, match="expected"):
        cache.write_rows("target", 0, [0, 1], 0, 3, b"\0" * 8)
    assert torch.equal(cache.group("target"), before)


def test_compaction_reads_all_sources_first_in_all_layers():
    cache, before = filled(), filled()
    pages = [4, 1, 2]
    cache.copy_rows(None, pages, [5, 6, 9], [4, 5, 6])
    for group in (TARGET, DRAFT):
        for layer in range(group.num_layers):
            expected = logical(before, group.name, layer, pages)
            expected[4:7] = expected[[5, 6, 9]].clone()
            assert torch.equal(logical(cache, group.name, layer, pages), expected)
    one = filled()
    one.copy_rows("draft/0", pages, [5], [4])
    assert torch.equal(one.group("target"), before.group("target"))
    with pytest.raises(ValueError, match="1 source rows for 2"):
        one.copy_rows(None, pages, [1], [2, 3])


def test_poison_marks_exactly_its_rows():
    cache = filled()
    cache.poison("target", [3, 0], 2, 6)
    for layer in range(3):
        nan = logical(cache, "target", layer, [3, 0]).float().isnan().flatten(1)
        assert np.array_equal(nan.all(1), nan.any(1))
        assert nan.all(1).nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert not cache.group("draft/0").isnan().any()
    cache.poison(None, [3, 0], 2, 6)
    assert logical(cache, "draft/0", 0, [3, 0])[2:6].isnan().all()
