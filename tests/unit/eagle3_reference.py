"""A world of random heads, tokens and hidden states in which the drafter is compared with the EAGLE-3 of the papers
(``pdspec.study.eagle3_reference``), and EAGLE-2's tree written from its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import PagePool, pages_for
from pdspec.model.config import ModelConfig
from pdspec.model.ops import Ops
from pdspec.noise import gumbel_noise
from pdspec.spec.eagle3.checkpoint import Head, random_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.eagle3.drafter import Eagle3Drafter
from pdspec.spec.eagle3.head import Eagle3Head
from pdspec.spec.protocol import Draft, DraftContext, HiddenRows, Verdict
from pdspec.study.eagle3_reference import PaperHead
from pdspec.types import SamplingParams

TARGET = ModelConfig(
    name="fake", architecture="LlamaForCausalLM", num_layers=8, hidden_size=48, num_heads=4, num_kv_heads=2,
    head_dim=16, intermediate_size=64, vocab_size=200, rms_norm_eps=1e-5, rope_theta=10000.0, max_context=256,
    tie_embeddings=True,
)
CONFIG = Eagle3Config.for_target(TARGET, 60)
HEAD = random_head(CONFIG, 1)
EMBEDDING = torch.randn(TARGET.vocab_size, TARGET.hidden_size, generator=torch.Generator().manual_seed(2))


def eagle2_tree(
    paper: PaperHead, ctx: DraftContext, captured: torch.Tensor, depth: int, top_k: int, nodes: int
) -> dict[tuple[int, ...], float]:
    """The tree as EAGLE-2 describes it, every frontier node expanded: path of target ids → cumulative score."""
    scores: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        children: dict[tuple[int, ...], float] = {}
        for path in frontier:
            score = child_scores(paper, ctx, captured, path)
            best = score.topk(min(top_k, len(score)))
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                children[(*path, int(paper.target_ids[index]))] = value + (scores[path] if path else 0.0)
        scores |= children
        frontier = sorted(children, key=lambda path: -children[path])[:top_k]
    return {path: scores[path] for path in sorted(scores, key=lambda path: -scores[path])[:nodes]}


def child_scores(
    paper: PaperHead, ctx: DraftContext, captured: torch.Tensor, path: tuple[int, ...]
) -> torch.Tensor:
    """log-softmax of (log q + g) over the draft vocabulary for the children of ``path``."""
    logits, temperature = paper.log_q(ctx.token_ids, captured, path), ctx.sampling.temperature
    if temperature == 0:
        return logits.log_softmax(-1)
    position = ctx.root_position + len(path) + 1
    noise = gumbel_noise(*ctx.noise_key, position, token_ids=paper.target_ids)
    return ((logits / temperature).log_softmax(-1) + noise).log_softmax(-1)


@dataclass(kw_only=True)
class World:
    """A drafter with pages of its own."""

    drafter: Eagle3Drafter
    cache: PagedCache
    pool: PagePool


def make_world(ops: Ops, *, page_size: int = 8, head: Head = HEAD, tree: str = "dynamic(3,3,6)") -> World:
    cache = PagedCache((TARGET.target_group("float32"), head.config.cache_group("float32")), 128, page_size)
    model = Eagle3Head(head, ops=ops, embedding=ops.pack(EMBEDDING), cache=cache, dtype="float32",
                       max_positions=TARGET.max_context)
    drafter = Eagle3Drafter(head, model, cache, dtype="float32", tree=tree)
    return World(drafter=drafter, cache=cache, pool=PagePool(128, page_size))


@dataclass(kw_only=True)
class Story:
    """One sequence: random tokens, random target hidden states, random acceptance; the same for the same seed."""

    world: World
    seed: int
    length: int
    temperature: float = 0.0
    tree: str = ""
    random: np.random.Generator = field(init=False)
    captured: torch.Tensor = field(init=False)  # [tokens before the root, 3, H]
    ctx: DraftContext = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.captured = self.hidden(self.length)
        rows = TARGET.max_context + self.world.drafter.max_nodes
        page_size = self.world.cache.page_size
        pages = self.world.pool.allocate(pages_for(min(rows, 160), page_size))
        self.ctx = DraftContext(
            request_id=f"story-{self.seed}", sampling=SamplingParams(temperature=self.temperature),
            noise_key=(self.seed, 0), token_ids=self.tokens(self.length), prompt_len=self.length, tree=self.tree,
            pages=[int(page) for page in np.random.default_rng(self.seed).permutation(pages)],
        )

    def tokens(self, count: int) -> list[int]:
        return self.random.integers(0, TARGET.vocab_size, count).tolist()

    def hidden(self, count: int) -> torch.Tensor:
        values = self.random.standard_normal((count, len(CONFIG.fused_layers), TARGET.hidden_size))
        return torch.from_numpy(values.astype(np.float32))

    def prefill(self, cuts: tuple[int, ...] = (), *, early_last: bool = False) -> Story:
        """Chunks cut at ``cuts``; ``early_last``: the last chunk comes before t_n is known, then an empty one."""
        edges = [0, *cuts, self.length]
        for a, b in pairwise(edges):
            if b == self.length and not early_last:
                self.ctx.token_ids += self.tokens(1)
            self.world.drafter.prefill(self.ctx, HiddenRows(start=a, captured=self.captured[a:b], final=None))
        if early_last:
            self.ctx.token_ids += self.tokens(1)
            empty = HiddenRows(start=self.length, captured=self.captured[:0], final=None)
            self.world.drafter.prefill(self.ctx, empty)
        return self

    def verdict(self, draft: Draft) -> tuple[DraftContext, Verdict, HiddenRows]:
        """A random node's path is accepted (or none), a random token follows; what ``observe`` is told of it."""
        node = int(self.random.integers(-1, draft.num_nodes))
        path: list[int] = []
        while node >= 0:
            path.insert(0, node)
            node = int(draft.parents[node])
        outputs = [int(draft.token_ids[node]) for node in path] + self.tokens(1)
        hidden, start = self.hidden(len(outputs)), self.ctx.root_position
        self.captured = torch.cat((self.captured, hidden))
        self.ctx.token_ids += outputs
        self.world.cache.poison("draft/eagle3", self.ctx.pages, start, len(self.ctx.pages) * self.world.cache.page_size)
        verdict = Verdict(path=tuple(path), output_ids=tuple(outputs))
        return self.ctx, verdict, HiddenRows(start=start, captured=hidden, final=None)

    def kv_rows(self) -> torch.Tensor:
        """The committed draft rows [n, 2, kv heads, D]."""
        count = self.world.drafter.rows_at(self.ctx.root_position)["draft/eagle3"]
        data = self.world.cache.read_rows("draft/eagle3", 0, self.ctx.pages, 0, count)
        rows = torch.frombuffer(bytearray(data), dtype=torch.float32)
        return rows.view(count, 2, CONFIG.num_kv_heads, CONFIG.head_dim)


def paths(draft: Draft) -> list[tuple[int, ...]]:
    """Each node as the target ids that lead to it."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.token_ids.tolist(), draft.parents.tolist(), strict=True):
        found.append((*found[parent], token) if parent >= 0 else (token,))
    return found
