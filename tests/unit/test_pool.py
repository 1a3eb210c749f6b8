import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdspec.cache.pool import IntegrityError, PagePool, PoolExhausted, pages_for
from pdspec.errors import Overloaded


@pytest.mark.parametrize(("rows", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_for(rows, pages):
    assert pages_for(rows, 16) == pages


def test_exhaustion_takes_nothing_and_is_an_overload():
    pool = PagePool(4, 16)
    pool.allocate(3)
    with pytest.raises(PoolExhausted, match="2 KV pages wanted, 1 of 4 free") as caught:
        pool.allocate(2)
    assert isinstance(caught.value, Overloaded)
    assert (pool.free, pool.held) == (1, 3)
    pool.check_integrity()


def test_shared_page_is_free_after_its_last_owner():
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    pool.retain(pages)
    pool.release(pages)
    assert (pool.free, pool.owners(pages[0])) == (1, 1)
    pool.release(pages)
    assert (pool.free, pool.held) == (2, 0)


@pytest.mark.parametrize("verb", ["release", "retain"])
@pytest.mark.parametrize("page", [0, -1, 9])
def test_pages_that_nobody_holds_are_refused(verb, page):
    pool = PagePool(4, 16)
    pool.release(pool.allocate(1))
    with pytest.raises(IntegrityError, match="nobody holds it"):
        getattr(pool, verb)([page])
    pool.check_integrity()


def test_claims_find_a_release_on_behalf_of_another_owner():
    pool = PagePool(4, 16)
    pages = pool.allocate(2)
    pool.retain(pages)
    pool.check_integrity(claims=[pages, pages])
    pool.release(pages)
    pool.release(pages)  # the first owner again: the second still believes it holds them
    with pytest.raises(IntegrityError, match="claims and owner counts differ"):
        pool.check_integrity(claims=[pages])


@pytest.mark.parametrize(("damage", "message"), [
    (lambda pool, page: pool._free.append(page), "both free and held"),
    (lambda pool, page: pool._free.append(pool._free[0]), "twice in the free list"),
    (lambda pool, page: pool._free.pop(), "not 4"),
    (lambda pool, page: pool._owners.__setitem__(page, -1), "negative"),
])
def test_integrity_names_each_damage(damage, message):
    pool = PagePool(4, 16)
    (page,) = pool.allocate(1)
    damage(pool, page)
    with pytest.raises(IntegrityError, match=message):
        pool.check_integrity()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("arf"), st.integers(0, 7)), max_size=60))
def test_random_life_keeps_the_books(operations):
    pool = PagePool(12, 4)
    owners: list[list[int]] = []
    for operation, number in operations:
        if operation == "a":
            if number > pool.free:
                with pytest.raises(PoolExhausted):
                    pool.allocate(number)
            else:
                owners.append(pool.allocate(number))
        elif owners and operation == "r":
            shared = owners[number % len(owners)]
            pool.retain(shared)
            owners.append(list(shared))
        elif owners:
            pool.release(owners.pop(number % len(owners)))
        pool.check_integrity(claims=owners)
        assert pool.held == len({page for pages in owners for page in pages})
    for pages in owners:
        pool.release(pages)
    assert pool.free == 12
