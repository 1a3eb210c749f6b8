"""The prefix cache's books, without a model: chained keys, pages by draft group and tokens ahead, least lately used."""

from __future__ import annotations

import random

import pytest

from pdspec.cache.pool import IntegrityError, PagePool, PoolExhausted
from pdspec.cache.prefix import MAX_VARIANTS, PrefixIndex

NONE, EAGLE = frozenset[str](), frozenset({"draft/eagle3"})


def make(num_pages: int = 8, page_size: int = 4) -> PrefixIndex:
    return PrefixIndex(PagePool(num_pages, page_size), "model")


def fill(index: PrefixIndex, tokens, *, groups=NONE, ahead=0, salt="", hidden=None) -> list[int]:
    """Pages of a sequence that was computed and has ended."""
    size = index.pool.page_size
    count = (len(tokens) - ahead) // size
    pages = index.pool.allocate(count)
    for i, (key, page) in enumerate(zip(index.keys(salt).first(tokens, count), pages, strict=True)):
        end = (i + 1) * size
        index.add(key, page, groups=groups, ahead=tuple(tokens[end : end + ahead]), hidden=hidden)
    index.pool.release(pages)
    return pages


def find(index: PrefixIndex, tokens, groups=NONE, salt="") -> list[int]:
    keys = index.keys(salt).first(tokens, len(tokens) // index.pool.page_size)
    return [one.page for one in index.find(keys, tokens, groups)]


def test_the_longest_common_beginning_is_found_and_no_page_whose_past_differs():
    index = make()
    pages = fill(index, list(range(12)))
    assert find(index, [*range(12), 99]) == pages
    assert find(index, [*range(6), 99, 99, *range(8, 12)]) == pages[:1]
    assert find(index, [99, *range(1, 12)]) == []
    assert find(index, list(range(12)), salt="other") == []
    index.pool.check_integrity([])


def test_idle_pages_are_free_and_given_up_when_they_are_wanted_the_last_of_a_chain_first():
    index = make(num_pages=6)
    old, new = fill(index, list(range(12))), fill(index, list(range(50, 58)))
    assert (index.pool.free, index.pool.held, index.pool.idle, len(index)) == (6, 0, 5, 5)
    find(index, list(range(12)))  # used later than the other chain
    taken = index.pool.allocate(3)
    assert index.evictions == 2 and find(index, list(range(50, 58))) == [] and find(index, list(range(12))) == old
    more = index.pool.allocate(2)
    assert find(index, list(range(12))) == old[:1] and set(new) <= {*taken, *more}
    with pytest.raises(PoolExhausted):
        index.pool.allocate(2)
    index.pool.check_integrity([taken, more])


def test_pages_in_use_are_never_given_up():
    index = make(num_pages=4)
    pages = fill(index, list(range(8)))
    index.pool.retain(pages)
    assert index.pool.free == 2 and index.pool.held == 2
    with pytest.raises(PoolExhausted):
        index.pool.allocate(3)
    assert find(index, list(range(8))) == pages and index.evictions == 0
    index.pool.check_integrity([pages])
    with pytest.raises(IntegrityError, match="claims"):
        index.pool.check_integrity([])
    index.pool.release(pages)
    assert index.pool.allocate(4) and len(index) == 0


def test_draft_rows_count_only_with_the_tokens_they_have_read():
    """Two answers go on differently behind a page: each finds its own; to a third one it is the last page."""
    index, same = make(num_pages=16), list(range(4))
    a, b = (fill(index, [*same, *[token] * 5], groups=EAGLE, ahead=1) for token in (7, 8))
    assert find(index, [*same, *[7] * 5], EAGLE) == a and find(index, [*same, *[8] * 5], EAGLE) == b
    assert len(find(index, [*same, *[9] * 5], EAGLE)) == 1
    assert len(find(index, [*same, *[7] * 5])) == 2, "target rows do not depend on what follows"
    assert find(index, [*same, *[7] * 5], frozenset({"draft/other"})) == []


def test_a_page_with_more_takes_the_place_of_one_with_less_and_hidden_rows_are_added():
    index, tokens = make(), list(range(5))
    fill(index, tokens)
    (rich,) = fill(index, tokens, groups=EAGLE, ahead=1)
    assert find(index, tokens) == [rich] and len(index) == 1
    fill(index, tokens)
    fill(index, tokens, groups=EAGLE, ahead=1, hidden="kept")
    assert [one.hidden for one in index.pages()] == ["kept"] and find(index, tokens, EAGLE) == [rich]
    for other in range(10, 20):
        fill(index, [*tokens[:4], other], groups=EAGLE, ahead=1)
    assert len(index) == MAX_VARIANTS and index.pool.idle == MAX_VARIANTS
    index.clear()
    assert len(index) == 0 and index.pool.free == 8


def test_random_lives_leave_the_books_balanced():
    chance, index = random.Random(0), make(num_pages=24)
    held: list[list[int]] = []
    for _ in range(600):
        tokens = [chance.randrange(2) for _ in range(chance.randrange(4, 24))]
        groups = chance.choice((NONE, EAGLE))
        found = find(index, tokens, groups)
        index.pool.retain(found)
        count = max(0, len(tokens) // 4 - len(found))
        try:
            pages = found + index.pool.allocate(count)
        except PoolExhausted:
            index.pool.release(found)
            pages = []
        held.append(pages)
        keys = index.keys().first(tokens, len(pages))
        for i, page in enumerate(pages):
            index.add(keys[i], page, groups=groups, ahead=tuple(tokens[4 * i + 4 : 4 * i + 5]))
        while len(held) > 3 or (held and chance.random() < 0.3):
            index.pool.release(held.pop(chance.randrange(len(held))))
        index.pool.check_integrity(held)
    assert index.evictions > 50
