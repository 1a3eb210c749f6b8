"""A world of random modules, tokens and hidden states in which the MTP drafter is compared with the report
(``pdspec.study.mtp_reference``)."""

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
from pdspec.spec.mtp.checkpoint import Head, random_head
from pdspec.spec.mtp.config import MtpConfig
from pdspec.spec.mtp.drafter import MtpDrafter, ReusedModule
from pdspec.spec.mtp.head import make_modules
from pdspec.spec.protocol import Draft, DraftContext, HiddenRows, Verdict
from pdspec.types import SamplingParams

TARGET = ModelConfig(
    name="fake", architecture="LlamaForCausalLM", num_layers=8, hidden_size=48, num_heads=4, num_kv_heads=2,
    head_dim=16, intermediate_size=64, vocab_size=200, rms_norm_eps=1e-5, rope_theta=10000.0, max_context=256,
    tie_embeddings=False,
)
_RANDOM = torch.Generator().manual_seed(2)
EMBEDDING = torch.randn(TARGET.vocab_size, TARGET.hidden_size, generator=_RANDOM)
LM_HEAD = torch.randn(TARGET.vocab_size, TARGET.hidden_size, generator=_RANDOM) / 4


def head_of(modules: int, draft_vocab: int = 60) -> Head:
    return random_head(MtpConfig.for_target(TARGET, draft_vocab, modules), modules)


def child_scores(logits: torch.Tensor, ctx: DraftContext, target_ids: torch.Tensor, depth: int) -> torch.Tensor:
    """log-softmax of (log q + g) over the draft vocabulary, of tokens at ``depth``."""
    temperature = ctx.sampling.temperature
    if temperature == 0:
        return logits.log_softmax(-1)
    noise = gumbel_noise(*ctx.noise_key, ctx.root_position + depth, token_ids=target_ids)
    return ((logits / temperature).log_softmax(-1) + noise).log_softmax(-1)


@dataclass(kw_only=True)
class World:
    """A drafter with pages of its own."""

    head: Head
    drafter: MtpDrafter | ReusedModule
    cache: PagedCache
    pool: PagePool


def make_world(ops: Ops, modules: int, *, page_size: int = 8, reuse: bool = False, draft_vocab: int = 60) -> World:
    head = head_of(modules, draft_vocab)
    count = 1 if reuse else modules
    groups = [head.config.cache_group(m, "float32") for m in range(1, count + 1)]
    cache = PagedCache((TARGET.target_group("float32"), *groups), 160, page_size)
    made = make_modules(head, count, ops=ops, embedding=ops.pack(EMBEDDING), lm_head=ops.pack(LM_HEAD), cache=cache,
                        dtype="float32", max_positions=TARGET.max_context)
    drafter = (
        ReusedModule(head, made[0], cache, dtype="float32", tree="chain(3)") if reuse
        else MtpDrafter(head, made, cache, dtype="float32")
    )  # fmt: skip
    return World(head=head, drafter=drafter, cache=cache, pool=PagePool(160, page_size))


@dataclass(kw_only=True)
class Story:
    """One sequence: random tokens, random target hidden states, random acceptance; the same for the same seed."""

    world: World
    seed: int
    length: int
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    tree: str = ""
    random: np.random.Generator = field(init=False)
    final: torch.Tensor = field(init=False)  # [tokens before the root, H]
    ctx: DraftContext = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.final = self.hidden(self.length)
        pages = self.world.pool.allocate(pages_for(200, self.world.cache.page_size))
        self.ctx = DraftContext(
            request_id=f"story-{self.seed}", sampling=self.sampling, noise_key=(self.seed, 0), tree=self.tree,
            token_ids=self.tokens(self.length), prompt_len=self.length,
            pages=[int(page) for page in np.random.default_rng(self.seed).permutation(pages)],
        )
        self.poison(0)

    def tokens(self, count: int) -> list[int]:
        return self.random.integers(0, TARGET.vocab_size, count).tolist()

    def hidden(self, count: int) -> torch.Tensor:
        return torch.from_numpy(self.random.standard_normal((count, TARGET.hidden_size)).astype(np.float32))

    def poison(self, root: int) -> None:
        """NaN into everything that is no final row with the root at ``root``."""
        rows = self.world.drafter.rows_at(root) if root else {}
        for group in self.world.drafter.groups:
            last = len(self.ctx.pages) * self.world.cache.page_size
            self.world.cache.poison(group.name, self.ctx.pages, rows.get(group.name, 0), last)

    def prefill(self, cuts: tuple[int, ...] = (), *, early_last: bool = False) -> Story:
        """Chunks cut at ``cuts``; ``early_last``: the last chunk comes before t_n is known, then an empty one."""
        for a, b in pairwise([0, *cuts, self.length]):
            if b == self.length and not early_last:
                self.ctx.token_ids += self.tokens(1)
            self.world.drafter.prefill(self.ctx, HiddenRows(start=a, captured=None, final=self.final[a:b]))
        if early_last:
            self.ctx.token_ids += self.tokens(1)
            self.world.drafter.prefill(self.ctx, HiddenRows(start=self.length, captured=None, final=self.final[:0]))
        return self

    def verdict(self, draft: Draft) -> tuple[DraftContext, Verdict, HiddenRows]:
        """A random node's path is accepted (or none), a random token follows; what ``observe`` is told of it. Every
        row that is not final is lost."""
        node = int(self.random.integers(-1, draft.num_nodes))
        path: list[int] = []
        while node >= 0:
            path.insert(0, node)
            node = int(draft.parents[node])
        outputs = [int(draft.token_ids[node]) for node in path] + self.tokens(1)
        hidden, start = self.hidden(len(outputs)), self.ctx.root_position
        self.final = torch.cat((self.final, hidden))
        self.ctx.token_ids += outputs
        self.poison(start)
        verdict = Verdict(path=tuple(path), output_ids=tuple(outputs))
        return self.ctx, verdict, HiddenRows(start=start, captured=None, final=hidden)

    def kv_rows(self) -> list[torch.Tensor]:
        """The final rows of each module, [rows, 2, kv heads, D]."""
        found, c = [], self.world.head.config
        for group, count in self.world.drafter.rows_at(self.ctx.root_position).items():
            data = bytearray(self.world.cache.read_rows(group, 0, self.ctx.pages, 0, count))
            rows = torch.frombuffer(data, dtype=torch.float32) if count else torch.empty(0)
            found.append(rows.view(count, 2, c.num_kv_heads, c.head_dim))
        return found


def paths(draft: Draft) -> list[tuple[int, ...]]:
    """Each node as the target ids that lead to it."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.token_ids.tolist(), draft.parents.tolist(), strict=True):
        found.append((*found[parent], token) if parent >= 0 else (token,))
    return found
