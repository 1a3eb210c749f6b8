"""A target with sequences in its KV, over which the sparse drafter is compared with a dense float64 recompute."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from dense_llama import DenseLlama

from pdspec.cache.paged import PagedCache
from pdspec.model.batch import ForwardBatch
from pdspec.model.files import ModelFiles
from pdspec.model.loader import load_weights
from pdspec.model.runner import Runner
from pdspec.model.tiny import tiny_config
from pdspec.spec.protocol import DraftContext
from pdspec.spec.sparse.config import OBSERVED, View
from pdspec.spec.sparse.drafter import SparseDrafter
from pdspec.types import SamplingParams

CONFIG = tiny_config("tiny-1")
FILES = ModelFiles(name="tiny-1", path=None, config=CONFIG, content_hash="c1", tokenizer_hash="t")
DENSE = DenseLlama(CONFIG, load_weights(FILES, "float32"))
ROWS, PAGE = 192, 8


def view(sink=3, window=5, select="window", budget=OBSERVED):
    return View(sink=sink, window=window, select=select, budget=budget)


def make_world(ops, **changes):
    runner = Runner(CONFIG, load_weights(FILES, "float32"), ops=ops, dtype="float32")
    cache = PagedCache((runner.group,), 4 * ROWS // PAGE, PAGE)
    cache.poison(None, list(range(4 * ROWS // PAGE)), 0, 4 * ROWS)
    drafter = SparseDrafter(runner, cache, view(**changes))
    return SimpleNamespace(runner=runner, cache=cache, drafter=drafter, taken=0)


def begin(world, seed, length, *, temperature=0.0, tree="chain(4)", **sampling):
    """A sequence whose prompt is in the target's KV; the root is a random token."""
    random = np.random.default_rng(seed)
    pages = random.permutation(np.arange(world.taken, world.taken + ROWS // PAGE)).tolist()
    world.taken += ROWS // PAGE
    ctx = DraftContext(
        request_id=f"s{seed}", sampling=SamplingParams(temperature=temperature, **sampling), noise_key=(seed, 0),
        token_ids=random.integers(0, 256, length + 1).tolist(), pages=pages, prompt_len=length, tree=tree,
    )
    extend(world, ctx, 0)
    world.drafter.resume(ctx, *world.drafter.start(ctx))
    return ctx


def extend(world, ctx, start):
    """The target's rows from ``start`` up to the one before the root."""
    slots = np.arange(start, ctx.root_position, dtype=np.int32)
    world.runner.forward(ForwardBatch(
        token_ids=np.array(ctx.token_ids[start:-1], np.int32), positions=slots, slots=slots, prefix_len=slots + 1,
        sequence=np.zeros(len(slots), np.int32), ancestors=np.empty((len(slots), 0), np.int32),
        page_table=np.array([ctx.pages], np.int32), logit_rows=np.empty(0, np.int32),
    ), world.cache)


def sparse_logits(ctx, path, seen):
    """Dense logits after the root and ``path``: rows from the root on see the rows ``seen`` and one another."""
    tokens, root = [*ctx.token_ids, *path], ctx.root_position
    mask = torch.ones(len(tokens), len(tokens)).tril().bool()
    mask[root:, :root] = False
    mask[root:, torch.tensor(sorted(seen), dtype=torch.int64)] = True
    return DENSE(tokens, mask)[1][-1]


def target_rows(world, ctx, start, stop):
    return b"".join(world.cache.read_rows("target", layer, ctx.pages, start, stop) for layer in range(4))
