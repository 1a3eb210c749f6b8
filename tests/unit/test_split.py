"""Who holds what of a layer, and what cannot be shared out."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from pdspec.cache.paged import PagedCache
from pdspec.config import ClusterConfig, WorkerConfig
from pdspec.engine.resources import load
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch
from pdspec.model.config import weight_shapes
from pdspec.model.loader import load_weights, resolve
from pdspec.model.native_layers import check_sizes
from pdspec.model.split import shares, split
from pdspec.model.tiny import tiny_config
from pdspec.model.variants import Mla, Moe
from pdspec.parallel.ranks import Ranks
from tests.rank_threads import RankThread

TINY = tiny_config("tiny")
# SmolLM2-135M's attention: 9 query heads over 3 KV heads.
UNEVEN = dataclasses.replace(
    TINY, hidden_size=144, num_heads=9, num_kv_heads=3, intermediate_size=112, qkv_bias=True, qk_norm=True
)
WORKER = WorkerConfig(model="tiny", dtype="float32", drafter="none", drafters=("none",), cache_tokens=256, threads=1)


def test_shares_give_the_first_ranks_one_more():
    assert shares(3, 2) == [(0, 2), (2, 3)]
    assert shares(8, 3) == [(0, 3), (3, 6), (6, 8)]
    assert shares(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_uneven_heads_go_by_whole_groups():
    first, second = split(UNEVEN, 2)
    assert (first.kv_heads, first.columns) == ((0, 2), (0, 64))
    assert (second.kv_heads, second.columns) == ((2, 3), (64, 112))
    own = first.config(UNEVEN), second.config(UNEVEN)
    assert [(one.num_heads, one.num_kv_heads, one.intermediate_size) for one in own] == [(6, 2, 64), (3, 1, 48)]
    for one in own:
        check_sizes(one)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_are_the_whole_layer(ranks):
    """Rows put together are the matrix; partial products add up to the product."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(UNEVEN).items()}
    taken = [part.take(UNEVEN, weights) for part in split(UNEVEN, ranks)]
    for name in taken[0]:
        pieces = [one[name] for one in taken]
        if name.split(".")[-2] in ("o_proj", "down_proj"):
            assert torch.equal(torch.cat(pieces, 1), weights[name])
        elif "norm" in name:
            assert all(piece is weights[name] for piece in pieces)
        else:
            assert torch.equal(torch.cat(pieces), weights[name])
    assert {name for name in weights if ".layers." in name} == set(taken[0])


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match="2 KV heads.*use tp 2 or less"):
        split(TINY, 3)
    with pytest.raises(ConfigError, match="numerics: with tp 2.*fast"):
        Ranks(WORKER.replace(tp=2, numerics="exact"), TINY, RankThread)
    with pytest.raises(ConfigError, match="sparse:select"):
        sparse = WORKER.replace(tp=2, drafters=("none", "sparse"), options={"sparse:select": "snapkv"})
        Ranks(sparse, TINY, RankThread)
    moe = Moe(num_experts=4, experts_per_token=2, expert_size=32, dense_layers=())
    mla = Mla(kv_lora_rank=32, q_lora_rank=0, nope_head_dim=16, rope_head_dim=16, v_head_dim=16, interleaved=False)
    for change in ({"moe": moe}, {"mla": mla}):
        with pytest.raises(ConfigError, match="(experts|latent attention) are not shared out"):
            split(dataclasses.replace(TINY, **change), 2)
    with pytest.raises(ConfigError, match="tp"):
        WORKER.replace(tp=0)


def test_a_cluster_with_a_worker_of_several_ranks_is_fast_on_both_sides():
    cluster = ClusterConfig(worker=WORKER, prefill_worker={"tp": 2})
    assert [(c.tp, c.numerics) for c in (cluster.worker_config(r, 0) for r in ("prefill", "decode"))] == [
        (2, "fast"), (1, "fast")
    ]  # fmt: skip
    exact = ClusterConfig(worker=WORKER.replace(numerics="exact"), prefill_worker={"tp": 2})
    assert exact.worker_config("decode", 0).numerics == "exact"  # the prefill worker refuses to start
    assert ClusterConfig(worker=WORKER).worker_config("decode", 0).numerics == "auto"


@pytest.fixture(scope="module")
def caches():
    """The same pages on two ranks and on one."""
    ranks = Ranks(WORKER.replace(tp=2, num_pages=8, page_size=4), TINY, RankThread)
    weights = load_weights(resolve("tiny"), "float32")
    ops = ranks.ops()
    runner = ranks.runner(weights, ops)
    draft = dataclasses.replace(runner.group, name="draft/0", num_layers=1)
    yield ranks.cache((runner.group, draft), ops.device), PagedCache((runner.group, draft), 8, 4)
    ranks.close()
    ops.close()


class _Left(Exception):
    pass


def test_a_forward_that_is_left_in_the_middle_harms_none_that_follows():
    """An abandoned prefill ends after the layer at hand."""
    tokens, logits = np.arange(40, 52, dtype=np.int32), []

    def leave(layer: int) -> None:
        if layer == 1:
            raise _Left

    for tp in (1, 2):
        resources = load(WORKER.replace(tp=tp, numerics="fast"), RankThread)
        try:
            with pytest.raises(_Left):
                resources.runner.forward(_prompt(tokens[::-1].copy()), resources.cache, leave)
            logits.append(resources.runner.forward(_prompt(tokens), resources.cache, lambda layer: None).logits)
            with pytest.raises(ConfigError, match="queries") if tp > 1 else nullcontext():
                resources.runner.forward(_prompt(tokens), resources.cache, on_queries=lambda layer, q: None)
        finally:
            resources.close()
    assert torch.allclose(*logits, atol=1e-4, rtol=0) and logits[0].abs().max() > 1


def _prompt(tokens: np.ndarray) -> ForwardBatch:
    slots = np.arange(len(tokens), dtype=np.int32)
    return ForwardBatch(
        token_ids=tokens, positions=slots, sequence=np.zeros_like(slots), slots=slots, prefix_len=slots + 1,
        ancestors=np.empty((len(slots), 0), np.int32), page_table=np.array([[3]], np.int32), logit_rows=slots,
    )  # fmt: skip


def test_rows_of_two_ranks_read_as_those_of_one(caches):
    generator, pages = torch.Generator().manual_seed(2), [5, 0, 3]
    assert caches[0].layout("target") == caches[1].layout("target") == caches[0].groups[0]
    assert caches[0].group("target").shape[-2] == 1  # its own head alone
    for group, layer in (("target", 2), ("target", 0), ("draft/0", 0)):
        rows = torch.randn(9 * 2 * 2 * 16, generator=generator).numpy().tobytes()
        for cache in caches:
            cache.write_rows(group, layer, pages, 2, 11, rows)
            assert cache.read_rows(group, layer, pages, 2, 11) == rows
    one_head = torch.randn(3 * 2 * 16, generator=generator).numpy().tobytes()
    for cache in caches:
        cache.write_rows("target", 2, pages, 5, 8, one_head, 1, 1)
        cache.copy_rows(None, pages, [3, 7, 10], [2, 3, 4])
        cache.copy_page("target", 0, 6)
        cache.poison("target", pages, 9, 10)
    for heads in ((0, None), (0, 1), (1, 1), (1, 0)):
        for start, stop in ((0, 12), (3, 9), (4, 4)):
            mine, theirs = (c.read_rows("target", 2, [5, 6, 3], start, stop, *heads) for c in caches)
            assert mine == theirs
    for cache in caches:
        for rows_and_heads in ((0, 13), (0, 1, 2, 1)):
            with pytest.raises(IndexError):
                cache.read_rows("target", 0, pages, *rows_and_heads)
        with pytest.raises(ValueError):
            cache.write_rows("target", 0, pages, 0, 2, b"\0" * 8)
