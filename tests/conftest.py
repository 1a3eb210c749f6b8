"""For all tests: what one module leaves alive (Ray, transformers, models) is not searched through by every garbage
collection of the modules after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> Iterator[None]:
    yield
    gc.collect()
    gc.freeze()
