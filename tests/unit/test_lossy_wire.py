"""KV rounded to int8 on the wire: how far a value may move, what blocks depend on, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError, TransferDamaged
from pdspec.transfer.lossy import BLOCK, decode, encode, encoded_bytes
from pdspec.types import CacheGroup

TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def layout(dtype: str = "bfloat16", parts: int = 2) -> CacheGroup:
    return CacheGroup(name="target", num_layers=1, num_kv_heads=3, head_dim=8, dtype=dtype, parts=parts)


def rows(count: int, group: CacheGroup, seed: int = 0) -> torch.Tensor:
    """[count, parts, heads, dim], heads of very different sizes."""
    values = torch.randn(count, group.parts, 3, 8, generator=torch.Generator().manual_seed(seed))
    return (values * torch.tensor([0.01, 1.0, 300.0])[:, None]).to(TYPES[group.dtype])


def raw(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def there_and_back(values: torch.Tensor, group: CacheGroup, start: int) -> torch.Tensor:
    data = encode(raw(values), group, start, len(values))
    assert len(data) == encoded_bytes(group, start, len(values), 3)
    back = np.frombuffer(decode(data, group, start, len(values), 3), np.uint8).copy()
    return torch.from_numpy(back).view(TYPES[group.dtype]).view(values.shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("start", "count"), [(0, 64), (0, 1), (5, 3), (7, 40), (15, 2), (16, 16)])
def test_a_value_moves_by_half_a_step_of_its_own_block_at_most(dtype, parts, start, count):
    group = layout(dtype, parts)
    values = rows(count, group)
    back = there_and_back(values, group, start).double()
    for first in range(-(start % BLOCK), count, BLOCK):
        block = slice(max(0, first), first + BLOCK)
        largest = values[block].double().abs().amax(dim=(0, 3), keepdim=True)
        allowed = largest / 254 * (1 + 1e-5) + (back[block].abs() * 2**-8 if dtype == "bfloat16" else 0)
        assert ((back[block] - values[block].double()).abs() <= allowed).all()
    assert (values[1:].double() != back[1:]).any() or count == 1, "nothing was rounded: the test says nothing"


def test_the_same_rows_in_frames_cut_at_blocks_are_the_same_bytes():
    group = layout()
    values = rows(50, group)
    parts = [there_and_back(values[a:b], group, a) for a, b in ((0, 16), (16, 48), (48, 50))]
    assert torch.equal(torch.cat(parts), there_and_back(values, group, 0))


def test_zeros_stay_zeros_and_bfloat16_rounds_as_torch_does():
    group = layout()
    zeros = torch.zeros(20, 2, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(there_and_back(zeros, group, 3), zeros)
    values = rows(16, group)
    back = there_and_back(values, group, 0)
    scale = values.float().abs().amax(dim=(0, 3), keepdim=True) / 127
    expected = torch.round(values.float() / scale) * scale
    assert (back.float() - expected.bfloat16().float()).abs().max() <= 2**-7 * expected.abs().max()


def test_half_the_bytes_of_bfloat16():
    group = CacheGroup(name="target", num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
    assert encoded_bytes(group, 0, 512, 3) / (512 * group.row_bytes) == pytest.approx(0.5 * (64 + 4 / 16) / 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none_and_other_lengths_are_refused(bad):
    group = layout()
    data = bytearray(encode(raw(rows(20, group)), group, 0, 20))
    for wrong in (data[:-1], bytes(data) + b"\0", b""):
        with pytest.raises(TransferDamaged, match="bytes for 20 rows") as caught:
            decode(bytes(wrong), group, 0, 20, 3)
        assert caught.value.field == "pages.target"
    data[4:8] = np.float32(bad).tobytes()
    with pytest.raises(TransferDamaged, match="no size"):
        decode(data, group, 0, 20, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_never_lands(bad):
    group = layout()
    values = rows(40, group)
    values[20, 1, 2, 3] = bad
    with pytest.raises(TransferDamaged, match="no size"):
        there_and_back(values, group, 0)


def test_lossy_and_exact_exclude_each_other():
    with pytest.raises(ConfigError, match="lossy") as caught:
        WorkerConfig(wire_kv="int8", numerics="exact")
    assert caught.value.field == "wire_kv" and "fast" in caught.value.remedy
    assert WorkerConfig(wire_kv="int8").lossy_wire and not WorkerConfig().lossy_wire
    with pytest.raises(ConfigError, match="unknown value"):
        WorkerConfig(wire_kv="int4")
