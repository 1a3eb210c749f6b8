"""The operations that drafters and models are tested over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pdspec.model.native import NativeOps
from pdspec.model.ops import Ops, TorchOps


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOps]:
    """The CPU kernels."""
    torch.set_num_threads(1)  # as make_ops does
    ops = NativeOps(2)
    yield ops
    ops.close()


@pytest.fixture(params=["native", "torch"])
def ops(request: pytest.FixtureRequest, native: NativeOps) -> Ops:
    """The kernels, then torch's own operations."""
    return native if request.param == "native" else TorchOps(torch.device("cpu"))
