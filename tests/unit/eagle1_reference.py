"""A story that holds any ``FeatureDrafter`` (EAGLE-1, EAGLE-3, EAGLE-3.1; stable or not, padded or not) to a head
written from the papers (``pdspec.study.eagle1_reference``, ``eagle3_reference``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from eagle3_reference import EMBEDDING, TARGET

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import PagePool, pages_for
from pdspec.model.ops import Ops
from pdspec.spec.eagle1.checkpoint import random_head
from pdspec.spec.eagle1.config import Eagle1Config
from pdspec.spec.eagle1.drafter import Eagle1Drafter
from pdspec.spec.eagle1.head import Eagle1Head
from pdspec.spec.eagle3.checkpoint import random_head as random_head3
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.eagle3.drafter import Eagle3Drafter
from pdspec.spec.eagle3.head import Eagle3Head
from pdspec.spec.feature_drafter import FeatureDrafter
from pdspec.spec.protocol import Draft, DraftContext, HiddenRows, Verdict
from pdspec.study.eagle1_reference import PaperEagle1
from pdspec.study.eagle3_reference import PaperHead
from pdspec.types import SamplingParams, Verify

CONFIG = Eagle1Config.for_target(TARGET, 60)
HEAD = random_head(CONFIG, 1)
LM_HEAD = torch.randn(TARGET.vocab_size, TARGET.hidden_size, generator=torch.Generator().manual_seed(5)) / 4
HEADS = {
    "eagle1": HEAD,
    "whole": random_head(Eagle1Config.for_target(TARGET, TARGET.vocab_size, bias=False), 2),
    "small": random_head(Eagle1Config.for_target(TARGET, 4), 5),
    "eagle3": random_head3(Eagle3Config.for_target(TARGET, 60), 1),
    "fc_norm": random_head3(Eagle3Config.for_target(TARGET, 60, fc_norm=True), 1),
    "norm_output": random_head3(Eagle3Config.for_target(TARGET, 60, norm_output=True), 1),
    "tied": random_head3(Eagle3Config.for_target(TARGET, 60, tied_output=True), 1),
    "eagle3.1": random_head3(Eagle3Config.for_target(TARGET, 60, fc_norm=True, norm_output=True), 3),
}


@dataclass(kw_only=True)
class World:
    """A drafter with pages of its own, and its paper."""

    drafter: FeatureDrafter
    paper: Any
    cache: PagedCache
    pool: PagePool

    @property
    def group(self) -> str:
        return self.drafter.groups[0].name


def make_world(ops: Ops, kind: str = "eagle1", *, page_size: int = 8, tree: str = "dynamic(3,3,6)", **options) -> World:
    """``options`` are ``FeatureDrafter``'s."""
    head = HEADS[kind]
    third = isinstance(head.config, Eagle3Config)
    group = head.config.layer_group("draft/eagle3" if third else "draft/eagle1", "float32")
    cache = PagedCache((TARGET.target_group("float32"), group), 128, page_size)
    common = {"ops": ops, "embedding": ops.pack(EMBEDDING), "cache": cache, "dtype": "float32",
              "max_positions": TARGET.max_context}
    options |= {"dtype": "float32", "tree": tree}
    paper: Any
    drafter: FeatureDrafter
    if third:
        paper = PaperHead(head, EMBEDDING, LM_HEAD)
        drafter = Eagle3Drafter(head, Eagle3Head(head, lm_head=ops.pack(LM_HEAD), **common), cache, **options)
    else:
        paper = PaperEagle1(head, EMBEDDING, LM_HEAD)
        model = Eagle1Head(head, lm_head=ops.pack(LM_HEAD), group=group.name, **common)
        drafter = Eagle1Drafter("eagle1", head, model, cache, group=group.name, **options)
    return World(drafter=drafter, paper=paper, cache=cache, pool=PagePool(128, page_size))


@dataclass(kw_only=True)
class Story:
    """One sequence: random tokens, random target hidden states, random acceptance; the same for the same seed.
    ``used`` are the features that its committed rows were made of, by the paper's rules."""

    world: World
    seed: int
    length: int
    temperature: float = 0.0
    tree: str = ""
    verify: str = Verify.COUPLED
    padding: int = field(init=False)
    random: np.random.Generator = field(init=False)
    target: torch.Tensor = field(init=False)  # hidden states of the tokens before the root
    used: torch.Tensor = field(init=False)  # [draft rows, H] float64
    ctx: DraftContext = field(init=False)
    kept: int = 0  # rows of the last verification that the tree had made

    def __post_init__(self) -> None:
        self.padding = self.world.drafter.rows_at(0)[self.world.group]
        self.random = np.random.default_rng(self.seed)
        self.target = self.hidden(self.length)
        pages = self.world.pool.allocate(pages_for(160, self.world.cache.page_size))
        self.ctx = DraftContext(
            request_id=f"story-{self.seed}", noise_key=(self.seed, 0), token_ids=self.tokens(self.length),
            sampling=SamplingParams(temperature=self.temperature, verify=self.verify), prompt_len=self.length,
            tree=self.tree, pages=[int(page) for page in np.random.default_rng(self.seed).permutation(pages)],
        )
        self.used = torch.cat((torch.zeros(self.padding, TARGET.hidden_size).double(), self.fuse(self.target)))

    def fuse(self, values: torch.Tensor) -> torch.Tensor:
        return self.world.paper.fuse(values)

    def tokens(self, count: int) -> list[int]:
        return self.random.integers(0, TARGET.vocab_size, count).tolist()

    def hidden(self, count: int) -> torch.Tensor:
        levels = (len(self.world.drafter.capture),) if self.world.drafter.capture else ()
        return torch.from_numpy(self.random.standard_normal((count, *levels, TARGET.hidden_size)).astype(np.float32))

    def rows(self, start: int, values: torch.Tensor) -> HiddenRows:
        final = self.world.drafter.want_final
        return HiddenRows(start=start, captured=None if final else values, final=values if final else None)

    def following(self, *path: int) -> list[int]:
        """What each draft row reads, then those of ``path``."""
        return [*self.ctx.token_ids[1 - self.padding :], *path]

    def prefill(self, cuts: tuple[int, ...] = ()) -> Story:
        for a, b in pairwise([0, *cuts, self.length]):
            if b == self.length:
                self.ctx.token_ids += self.tokens(1)
            self.world.drafter.prefill(self.ctx, self.rows(a, self.target[a:b]))
        return self

    def verdict(self, draft: Draft) -> tuple[DraftContext, Verdict, HiddenRows]:
        """A random node's path is accepted (or none), a random token follows; what ``observe`` is told of it."""
        node, path = int(self.random.integers(-1, draft.num_nodes)), []
        while node >= 0:
            path.insert(0, node)
            node = int(draft.parents[node])
        accepted = [int(draft.token_ids[node]) for node in path]
        values, start = self.hidden(len(path) + 1), self.ctx.root_position
        self.target = torch.cat((self.target, values))
        made = self.ctx.state.made
        self.kept = sum(tuple(accepted[:depth]) in made for depth in range(1, len(path) + 1))
        for token in accepted[: self.kept]:  # what the tree's rows read: outputs of the rows before
            _, outputs = self.world.paper.layer(self.following(), self.used)
            self.used = torch.cat((self.used, outputs[-1:]))
            self.ctx.token_ids.append(token)
        outputs_ids = accepted + self.tokens(1)
        self.ctx.token_ids += outputs_ids[self.kept :]
        self.used = torch.cat((self.used, self.fuse(values)[self.kept :]))
        if self.world.drafter.stable_kv:
            self.poison(start)
        return self.ctx, Verdict(path=tuple(path), output_ids=tuple(outputs_ids)), self.rows(start, values)

    def poison(self, tokens: int) -> None:
        """NaN into every row that is not committed with ``tokens`` before the root."""
        start = self.world.drafter.rows_at(tokens)[self.world.group]
        stop = len(self.ctx.pages) * self.world.cache.page_size
        self.world.cache.poison(self.world.group, self.ctx.pages, start, stop)

    def kv_rows(self) -> torch.Tensor:
        """The committed draft rows [n, 2, kv heads, D]."""
        count = self.world.drafter.rows_at(self.ctx.root_position)[self.world.group]
        data = self.world.cache.read_rows(self.world.group, 0, self.ctx.pages, 0, count)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(count, 2, TARGET.num_kv_heads, -1)

    def assert_as_recomputed(self) -> None:
        """Draft KV, the next feature and the logits of the first draft token equal the paper's."""
        kv, outputs = self.world.paper.layer(self.following(), self.used)
        state, model = self.ctx.state, self.world.drafter.model
        assert len(kv) == state.rows == self.ctx.root_position + self.padding
        torch.testing.assert_close(self.kv_rows().double(), kv, atol=1e-4, rtol=0)
        torch.testing.assert_close(state.feature.double(), outputs[-1:], atol=1e-4, rtol=0)
        logits = self.world.paper.logits(outputs[-1])
        torch.testing.assert_close(model.logits(state.feature)[0].double(), logits, atol=2e-4, rtol=0)
