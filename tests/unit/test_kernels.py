"""The C kernels: equal to plain torch up to rounding, and row-invariant to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pdspec.cache.paged import PagedCache
from pdspec.model.batch import ForwardBatch
from pdspec.model.native import NativeOps
from pdspec.model.ops import TorchOps, make_rope
from pdspec.types import CacheGroup

DTYPES = [torch.bfloat16, torch.float32]


# The kernels are written for any vector width; each width's code must work, whatever this machine's is.
@pytest.fixture(scope="module", params=["native", "16", "32", "64", "no dots"])
def ops(request):
    width = (f"-DPDSPEC_VECTOR_BYTES={request.param}",)
    flags = {"native": (), "no dots": ("-DPDSPEC_NO_DOTS",)}.get(request.param, width)
    ops = NativeOps(2, *flags)
    yield ops
    ops.close()


def batch_of(rows: int, *, prefix: int = 37, ancestors: bool = False) -> ForwardBatch:
    """``rows`` rows of one sequence behind ``prefix`` committed rows: a chain, or a tree of siblings' children."""
    index = np.arange(rows, dtype=np.int32)
    slots = prefix + index
    if ancestors:
        paths = np.full((rows, 2), -1, np.int32)
        paths[:, 0] = np.where(index < 2, slots, prefix + index % 2)
        paths[2:, 1] = slots[2:]
        lengths = np.full(rows, prefix, np.int32)
    else:
        paths, lengths = np.empty((rows, 0), np.int32), slots + 1
    pages = np.random.default_rng(0).permutation(40)[: (prefix + rows) // 8 + 1].astype(np.int32)
    return ForwardBatch(
        token_ids=index,
        positions=slots.astype(np.int32),
        sequence=np.zeros(rows, np.int32),
        slots=slots.astype(np.int32),
        prefix_len=lengths.astype(np.int32),
        ancestors=paths,
        page_table=pages[None],
        logit_rows=index,
    )


def pick(batch: ForwardBatch, rows: list[int]) -> ForwardBatch:
    take = {
        n: np.ascontiguousarray(getattr(batch, n)[rows])
        for n in ("token_ids", "positions", "sequence", "slots", "prefix_len", "ancestors")
    }
    return ForwardBatch(**take, page_table=batch.page_table, logit_rows=np.arange(len(rows), dtype=np.int32))


def filled_cache(dtype: str) -> torch.Tensor:
    group = CacheGroup(name="target", num_layers=1, num_kv_heads=3, head_dim=32, dtype=dtype)
    cache = PagedCache((group,), 40, 8)
    layer = cache.group("target")[0]
    layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(1)))
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 64), (50, 48), (1, 16)])
def test_linear_is_torch_linear_and_every_row_count_gives_the_same_bits(ops, dtype, shape):
    weight = torch.randn(shape).to(dtype)
    packed, x, bias = ops.pack(weight), torch.randn(131, shape[1]), torch.randn(shape[0])
    whole = ops.linear(x, packed, bias)
    read = x.bfloat16().float() if dtype == torch.bfloat16 and ops.rounds_inputs else x
    torch.testing.assert_close(whole, read @ weight.float().T + bias, rtol=1e-4, atol=1e-4)
    for start in (0, 5, 97):
        for rows in (*range(1, 27), 33):
            assert torch.equal(ops.linear(x[start : start + rows], packed, bias), whole[start : start + rows])
    ids = np.array([0, shape[0] - 1], np.int32)
    assert torch.equal(ops.embed(packed, ids), weight[ids].float())


def test_linear_adds_into_its_output(ops):
    packed, x = ops.pack(torch.randn(32, 16)), torch.randn(4, 16)
    out = torch.ones(4, 32)
    ops.linear(x, packed, out=out, add=True)
    assert torch.equal(out, ops.linear(x, packed) + 1)


def test_row_operations_are_those_of_torch(ops):
    reference, x, weight = TorchOps(torch.device("cpu")), torch.randn(700, 64) * 5, torch.rand(64)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ops.silu_mul(x * 20), reference.silu_mul(x * 20), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("ancestors", [False, True])
def test_attention_matches_torch_and_a_row_ignores_its_neighbours(ops, dtype, ancestors):
    batch, rope = batch_of(9, ancestors=ancestors), make_rope(head_dim=32, theta=1e4, max_positions=64)
    qkv = torch.randn(9, (6 + 6) * 32)
    ours, theirs = filled_cache(dtype), filled_cache(dtype)
    q = ops.rope_store(qkv.clone(), rope, batch, ours)
    reference = TorchOps(torch.device("cpu"))
    q_reference = reference.rope_store(qkv, rope, batch, theirs)
    torch.testing.assert_close(q, q_reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-5)
    whole = ops.attend(q, batch, ours)
    torch.testing.assert_close(whole, reference.attend(q_reference, batch, theirs), rtol=2e-2, atol=2e-2)
    for rows in ([0], [8], [3, 4], [2, 8, 5]):
        assert torch.equal(ops.attend(q[rows].contiguous(), pick(batch, rows), ours), whole[rows])


def test_a_tree_path_has_the_bits_of_the_same_chain(ops):
    layer, q = filled_cache("float32"), torch.randn(1, 6, 32)
    chain = batch_of(3)
    tree = ForwardBatch(
        token_ids=chain.token_ids,
        positions=chain.positions,
        sequence=chain.sequence,
        slots=chain.slots,
        prefix_len=np.full(3, 37, np.int32),
        page_table=chain.page_table,
        logit_rows=chain.logit_rows,
        ancestors=np.array([[37, -1, -1], [37, 38, -1], [37, 38, 39]], np.int32),
    )
    for row in range(3):
        assert torch.equal(ops.attend(q, pick(chain, [row]), layer), ops.attend(q, pick(tree, [row]), layer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_thousands_of_ancestors_have_the_bits_of_a_prefix_and_may_skip_rows(ops, dtype):
    """A sparse view names every row it sees behind its sink; 3 rows and then 1 of two sequences, pages in any order."""
    keys, rng = 2900, np.random.default_rng(4)
    layer, q = torch.randn(400, 16, 2, 2, 32).to(dtype), torch.randn(4, 6, 32)
    zeros, none = np.zeros(4, np.int32), np.empty((4, 0), np.int32)
    pages = rng.permutation(400).astype(np.int32).reshape(2, 200)
    dense = ForwardBatch(
        token_ids=zeros, positions=zeros, slots=zeros, sequence=np.array([0, 0, 0, 1], np.int32), page_table=pages,
        prefix_len=np.array([keys, keys, keys - 7, keys], np.int32), ancestors=none, logit_rows=zeros[:0],
    )
    named = np.full((4, keys - 4), -1, np.int32)
    for row, length in enumerate(dense.prefix_len):
        named[row, : length - 4] = np.arange(4, length)
    sparse = dataclasses.replace(dense, prefix_len=zeros + np.int32(4), ancestors=named)
    assert torch.equal(ops.attend(q, sparse, layer), ops.attend(q, dense, layer))
    some = np.sort(rng.permutation(np.arange(4, 3200))[:2500]).astype(np.int32)
    skipping = dataclasses.replace(dense, prefix_len=zeros + np.int32(4), ancestors=np.tile(some, (4, 1)))
    expected = TorchOps(torch.device("cpu")).attend(q, skipping, layer)
    torch.testing.assert_close(ops.attend(q, skipping, layer), expected, rtol=1e-4, atol=1e-5)


def random_rows(rng: np.random.Generator) -> list[tuple[int, int, list[int]]]:
    """(sequence, prefix, ancestors) of rows as chunks, decode rows and trees bring them."""
    rows = []
    for sequence in range(rng.integers(1, 5)):
        prefix = int(rng.integers(1, 90))
        for index in range(rng.integers(1, 12)):
            path = [] if rng.random() < 0.3 else list(range(prefix, prefix + int(rng.integers(1, 5))))
            rows.append((sequence, prefix + (index if rng.random() < 0.2 else 0), path))
    return rows


def as_batch(rows: list[tuple[int, int, list[int]]]) -> ForwardBatch:
    ancestors = np.full((len(rows), 4), -1, np.int32)
    for row, (_, _, path) in enumerate(rows):
        ancestors[row, : len(path)] = path
    zeros = np.zeros(len(rows), np.int32)
    return ForwardBatch(
        token_ids=zeros,
        positions=zeros,
        slots=zeros,
        sequence=np.array([row[0] for row in rows], np.int32),
        prefix_len=np.array([row[1] for row in rows], np.int32),
        ancestors=ancestors,
        page_table=np.arange(40, dtype=np.int32).reshape(5, 8),
        logit_rows=zeros[:0],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_every_tiling_gives_a_row_the_bits_it_has_alone(ops, dtype, dim, group):
    rng, layer = np.random.default_rng(dim + group), torch.randn(40, 16, 2, 2, dim).to(dtype)
    for _ in range(12):
        rows = random_rows(rng)
        q = torch.randn(len(rows), 2 * group, dim)
        whole = ops.attend(q, as_batch(rows), layer)
        for index, row in enumerate(rows):
            assert torch.equal(ops.attend(q[index : index + 1], as_batch([row]), layer)[0], whole[index])


def test_unpackable_weights_are_refused(ops):
    from pdspec.errors import ConfigError

    with pytest.raises(ConfigError, match="multiples of 16"):
        ops.pack(torch.randn(8, 10))
