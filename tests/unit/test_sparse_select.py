"""The prompt rows that a sparse view keeps: SnapKV's choice against a dense recompute, shipped and checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sparse_world import CONFIG, DENSE, ROWS, begin, make_world, sparse_logits, target_rows

from pdspec.errors import TransferDamaged
from pdspec.spec.sparse.config import OBSERVED
from pdspec.spec.sparse.select import attention_mass, choose_rows


@pytest.mark.parametrize("length", [5, 32, 33, 90])
def test_attention_mass_is_that_of_a_dense_recompute_and_only_scratch_is_written(ops, length):
    world = make_world(ops)
    ctx = begin(world, 7, length)
    world.cache.poison(None, ctx.pages, length, ROWS)
    before = target_rows(world, ctx, 0, length), target_rows(world, ctx, length + OBSERVED, ROWS)
    mass = attention_mass(world.runner, world.cache, ctx)
    assert before == (target_rows(world, ctx, 0, length), target_rows(world, ctx, length + OBSERVED, ROWS))
    torch.testing.assert_close(mass.double(), dense_mass(ctx.token_ids[:length]), atol=1e-2, rtol=1e-4)
    assert float(mass.sum()) == pytest.approx(min(length, OBSERVED) * 4 * CONFIG.num_heads, rel=1e-4)


def dense_mass(tokens):
    """Attention of the last 32 rows, from the KV and hidden states of the dense decoder."""
    total, count = torch.zeros(len(tokens), dtype=torch.float64), len(tokens)
    real = torch.Tensor.softmax

    def softmax(scores, dim):
        p = real(scores, dim)
        total.add_(p[:, max(0, count - OBSERVED) :].sum((0, 1)))
        return p

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", softmax)
        DENSE(tokens)
    return total


def test_the_rows_chosen_are_the_most_attended_with_their_neighbours_and_the_end(ops):
    world = make_world(ops)
    ctx = begin(world, 8, 90)
    chosen = choose_rows(world.runner, world.cache, ctx, 40)
    assert chosen.dtype == np.int32 and (np.diff(chosen) > 0).all() and len(chosen) == 40
    assert set(range(90 - OBSERVED, 90)) <= set(chosen.tolist())
    mass = dense_mass(ctx.token_ids[:90]).numpy()
    spread = np.array([mass[max(0, i - 3) : i + 4].max() for i in range(90)])[: 90 - OBSERVED]
    assert set(chosen[:8].tolist()) == set(np.argsort(-spread, kind="stable")[:8].tolist())
    assert choose_rows(world.runner, world.cache, begin(world, 9, 33), 40).tolist() == list(range(33))


def test_chosen_rows_are_shipped_seen_and_checked(native):
    world = make_world(native, select="snapkv", budget=34)
    ctx = begin(world, 8, 90)
    candidates, rows = world.drafter.start(ctx)
    selected = rows["selected"]
    assert candidates is None and selected.shape == (1, 34) and selected.dtype == torch.float32
    (draft,) = world.drafter.propose([ctx], [4])
    seen = {*range(3), *selected[0].int().tolist(), *range(85, 90)}
    assert int(draft.token_ids[0]) == int(sparse_logits(ctx, (), seen).argmax())
    shuffled, beyond, broken = selected.flip(1), selected + 1, selected + 0.5
    for damaged in ({}, {"selected": selected[:, 1:]}, {"selected": shuffled}, {"selected": beyond},
                    {"selected": broken}, {"selected": selected * torch.nan}):
        with pytest.raises(TransferDamaged, match="draft_start"):
            world.drafter.resume(ctx, None, damaged)


def test_what_is_shipped_is_in_the_fingerprint_and_what_is_not_is_not(native):
    def fingerprint(**changes):
        return make_world(native, **changes).drafter.fingerprint()

    assert fingerprint(sink=1, window=9) == fingerprint()
    assert len({fingerprint(), fingerprint(select="snapkv"), fingerprint(select="snapkv", budget=99)}) == 3
