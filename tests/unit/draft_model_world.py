"""A world of random tokens and acceptance in which the draft model is compared with a dense float64 recompute."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from dense_llama import DenseLlama

from pdspec.cache.paged import PagedCache
from pdspec.model.files import ModelFiles
from pdspec.model.loader import load_weights
from pdspec.model.runner import Runner
from pdspec.model.tiny import tiny_config
from pdspec.spec.draft_model.config import GROUP
from pdspec.spec.draft_model.drafter import ModelDrafter
from pdspec.spec.protocol import DraftContext, HiddenRows, Verdict
from pdspec.types import SamplingParams

CONFIG = tiny_config("tiny-3")
FILES = ModelFiles(name="tiny-3", path=None, config=CONFIG, content_hash="c3", tokenizer_hash="t")
DENSE = DenseLlama(CONFIG, load_weights(FILES, "float32"))
NUM_PAGES, ROWS = 256, 160  # of a world; of a story


@dataclass
class World:
    """A drafter with pages of its own, full of NaN: what is read was written."""

    drafter: ModelDrafter
    cache: PagedCache
    taken: int = 0
    computed: list[int] = field(default_factory=list)  # rows of each forward


def make_world(ops, *, page_size=8, **changes):
    runner = Runner(CONFIG, load_weights(FILES, "float32"), ops=ops, dtype="float32", group=GROUP)
    cache = PagedCache((CONFIG.cache_group(GROUP, "float32"),), NUM_PAGES, page_size)
    cache.poison(None, list(range(NUM_PAGES)), 0, NUM_PAGES * page_size)
    ids = torch.arange(CONFIG.vocab_size)
    settings = {"target_ids": ids, "content_hash": "c3", "tree": "dynamic(3,3,6)", **changes}
    world = World(ModelDrafter(runner, cache, **settings), cache)
    real = runner.forward

    def counted(batch, *rest):
        world.computed.append(batch.num_rows)
        return real(batch, *rest)

    runner.forward = counted
    return world


class Story:
    """One sequence: random tokens and random acceptance, the same for the same seed."""

    def __init__(self, world, seed, length, *, temperature=0.0, tree="", **sampling):
        self.world, self.random = world, np.random.default_rng(seed)
        count = ROWS // world.cache.page_size
        pages = np.random.default_rng(seed).permutation(np.arange(world.taken, world.taken + count))
        world.taken += count
        self.ctx = DraftContext(
            request_id=f"story-{seed}", sampling=SamplingParams(temperature=temperature, **sampling),
            noise_key=(seed, 0), token_ids=self.tokens(length), pages=pages.tolist(), prompt_len=length, tree=tree,
        )

    def tokens(self, count):
        return self.random.integers(0, CONFIG.vocab_size, count).tolist()

    def prefill(self, cuts=(), *, early_last=False):
        length = self.ctx.prompt_len
        for a, b in pairwise([0, *cuts, length]):
            if b == length and not early_last:
                self.ctx.token_ids += self.tokens(1)
            self.world.drafter.prefill(self.ctx, HiddenRows(start=a, captured=None, final=None, count=b - a))
        if early_last:
            self.ctx.token_ids += self.tokens(1)
            self.world.drafter.prefill(self.ctx, HiddenRows(start=length, captured=None, final=None))
        return self

    def verdict(self, draft, node=None):
        """The path down to ``node`` (None: a random one, or none) is accepted, a random token follows."""
        node = int(self.random.integers(-1, draft.num_nodes)) if node is None else node
        path = []
        while node >= 0:
            path.insert(0, node)
            node = int(draft.parents[node])
        outputs = [int(draft.token_ids[node]) for node in path] + self.tokens(1)
        self.ctx.token_ids += outputs
        return self.ctx, Verdict(path=tuple(path), output_ids=tuple(outputs)), HiddenRows(
            start=self.ctx.root_position - len(outputs), captured=None, final=None, count=len(outputs)
        )

    def kv_rows(self):
        """All rows up to the root's: [layers, n+1, 2, kv heads, D]."""
        count = self.ctx.root_position + 1
        layers = [self.world.cache.read_rows(GROUP, layer, self.ctx.pages, 0, count) for layer in range(4)]
        rows = torch.stack([torch.frombuffer(bytearray(layer), dtype=torch.float32) for layer in layers])
        return rows.view(4, count, 2, CONFIG.num_kv_heads, CONFIG.head_dim)

    def poison_scratch(self):
        self.world.cache.poison(GROUP, self.ctx.pages, self.ctx.root_position + 1, ROWS)


def assert_as_recomputed(story):
    """Row i reads t_i at position i, the root's included; its logits are those of the dense model."""
    kv, logits = DENSE(story.ctx.token_ids)
    assert story.ctx.state.rows == len(story.ctx.token_ids) == kv.shape[1]
    torch.testing.assert_close(story.kv_rows().double(), kv, atol=1e-4, rtol=0)
    torch.testing.assert_close(story.ctx.state.logits[0].double(), logits[-1], atol=1e-3, rtol=0)


def same_drafts(a, b):
    names = ("token_ids", "parents", "log_q", "survival")
    return all(np.array_equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in names)
