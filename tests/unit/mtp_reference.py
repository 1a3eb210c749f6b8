"""MTP modules written from the DeepSeek-V3 report (2412.19437, 2.2): dense, float64, no cache, no batching, and no code
shared with the drafter; and a world of random modules, tokens and hidden states in which the drafter is compared with
them."""

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


class PaperMtp:
    """All modules over a whole token sequence at once. ``shift`` moves the tokens that modules read: a mutation."""

    def __init__(self, head: Head, embedding: torch.Tensor, lm_head: torch.Tensor, *, shift: int = 0) -> None:
        self.w = {name: tensor.double() for name, tensor in head.tensors.items()}
        self.c, self.target_ids, self.shift = head.config, head.target_ids, shift
        self.embedding, self.lm_head = embedding.double(), lm_head.double()[head.target_ids]

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt() * weight

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, heads, D] at positions 0..R-1: pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half = self.c.head_dim // 2
        frequency = self.c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(len(x), half, dtype=torch.float64), torch.arange(len(x))[:, None] * frequency)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    def module(self, m: int, tokens: list[int], features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows i = 0.. of module m read features[i] = h^{m-1}_i and tokens[i] = t_{i+m}: (KV rows [R, 2, kv heads, D],
        h^m [R, H])."""
        c, rows, prefix = self.c, len(tokens), f"model.layers.{self.c.target_layers + m - 1}."

        def w(name: str) -> torch.Tensor:
            return self.w[f"{prefix}{name}.weight"]

        embedded = self.norm(self.embedding[tokens], w("enorm"))
        x = torch.cat((embedded, self.norm(features, w("hnorm"))), -1) @ w("eh_proj").T
        y = self.norm(x, w("input_layernorm"))
        q, k, v = ((y @ w(f"self_attn.{n}_proj").T).view(rows, -1, c.head_dim) for n in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        group = c.num_heads // c.num_kv_heads
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) / c.head_dim**0.5
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(group, 1)).flatten(1)
        x = x + mixed @ w("self_attn.o_proj").T
        y = self.norm(x, w("post_attention_layernorm"))
        gate, up = y @ w("mlp.gate_proj").T, y @ w("mlp.up_proj").T
        x = x + (torch.nn.functional.silu(gate) * up) @ w("mlp.down_proj").T
        return torch.stack((k, v), 1), self.norm(x, w("shared_head.norm"))

    def committed(self, tokens: list[int], final: torch.Tensor) -> list[torch.Tensor]:
        """The final KV rows of modules 1..N with root tokens[n]: n+1-m of module m; final [n, H] are h^0."""
        n, features, kv = len(tokens) - 1, final.double(), []
        for m in range(1, self.c.num_modules + 1):
            rows = max(0, n + 1 - m)
            if rows == 0:
                kv.append(torch.empty(0, 2, self.c.num_kv_heads, self.c.head_dim, dtype=torch.float64))
                continue
            first = m - self.shift
            one, features = self.module(m, tokens[first : first + rows], features[:rows])
            kv.append(one)
        return kv

    def logits(self, tokens: list[int], final: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
        """[draft vocabulary] for the token after the root and then ``path``: of module len(path)+1, row n-1."""
        n, features, known = len(tokens) - 1, final.double(), [*tokens, *path]
        for m in range(1, len(path) + 2):
            first = m - self.shift
            _, features = self.module(m, known[first : first + n], features)
        return self.lm_head @ features[n - 1]

    def reused_logits(self, tokens: list[int], final: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
        """The same where module 1 drafts every depth: its last output is the next row's h."""
        features, following = final.double(), tokens[1:]
        _, outputs = self.module(1, following, features)
        for token in path:
            features, following = torch.cat((features, outputs[-1:])), [*following, token]
            _, outputs = self.module(1, following, features)
        return self.lm_head @ outputs[-1]


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
