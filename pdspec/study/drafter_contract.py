"""``pdspec check drafter``: what a drafter promises to the engines, whatever its family.

trees       drafts are trees within their budget, through whole answers of a batch, for each kind of tree
state       what a drafter knows of a sequence is in its context and pages: two that take turns draft what one would
empty       an empty batch is fine
described   groups, rows, fingerprint, kinds of tree and default tree are what the family says

The target's hidden states and the tokens are random: what is drafted does not matter here, only its form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.errors import ConfigError, PdspecError
from pdspec.model.files import ModelFiles, resolve
from pdspec.model.loader import load_weights
from pdspec.model.ops import Ops, TorchOps
from pdspec.model.runner import Runner
from pdspec.spec.family import Parts, Setting
from pdspec.spec.protocol import Draft, DraftContext, Drafter, HiddenRows, Verdict
from pdspec.spec.registry import draft_groups, family, make_drafter
from pdspec.spec.tree import depths
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.parity import trees_of
from pdspec.types import SamplingParams

DTYPES = ("float32", "bfloat16")
TEMPERATURES = (0.0, 0.8)
PAGES, PAGE_SIZE, PAGES_EACH = 200, 16, 20
ALPHABET = 6  # so that n-grams repeat
STEPS = 15
Cut = tuple[int, int, tuple[int, ...]]  # a sequence: seed, prompt tokens, where its prefill is cut into chunks
SEQUENCES: tuple[Cut, ...] = ((1, 1, ()), (2, 9, (4,)), (3, 40, ()))


class ContractBroken(PdspecError):
    """A promise that a drafter does not keep."""


def require(holds: bool, promise: str) -> None:
    """Raises ContractBroken."""
    if not holds:
        raise ContractBroken(promise)


@dataclass(frozen=True, kw_only=True)
class World:
    """A target, and drafters over caches of ``PAGES`` pages."""

    setting: Setting
    ops: Ops
    runner: Runner

    @classmethod
    def of(cls, files: ModelFiles, dtype: str, **changes: Any) -> World:
        """``changes`` are those of ``Setting``. Loads the target's weights."""
        ops = TorchOps(torch.device("cpu"))
        runner = Runner(files.config, load_weights(files, dtype), ops=ops, dtype=dtype)
        return cls(setting=Setting(target=files, dtype=dtype, **{"heads": {}, **changes}), ops=ops, runner=runner)

    def make(self, name: str, pages: PagedCache | None = None) -> tuple[Drafter, PagedCache]:
        """A drafter over ``pages``, or over a cache of its own. Raises as ``make_drafter``."""
        if pages is None:
            groups = draft_groups([name], self.setting)
            pages = PagedCache((self.runner.group, *groups), PAGES, PAGE_SIZE, self.ops.device)
        return make_drafter(name, self.setting, Parts(ops=self.ops, cache=pages, runner=self.runner)), pages

    def begin(self, drafter: Drafter, cut: Cut, *, temperature: float = 0.0, tree: str = "") -> RandomSequence:
        """A sequence after prefill, start and resume, as engines run them."""
        seed, length, cuts = cut
        random = np.random.default_rng(seed)
        ctx = DraftContext(
            request_id=f"s{seed}", sampling=SamplingParams(temperature=temperature), noise_key=(seed, 0), tree=tree,
            token_ids=random.integers(0, ALPHABET, length).tolist(), prompt_len=length,
            pages=list(range(PAGES_EACH * seed, PAGES_EACH * (seed + 1))),
        )  # fmt: skip
        sequence = RandomSequence(ctx=ctx, random=random, width=self.setting.target.config.hidden_size)
        for start, stop in pairwise([0, *cuts, length]):
            if stop == length:
                ctx.token_ids += sequence.tokens(1)
            drafter.prefill(ctx, sequence.hidden(drafter, start, stop - start))
        candidates, rows = drafter.start(ctx)
        require(all(row.dtype == torch.float32 for row in rows.values()), "start gives rows of float32")
        drafter.resume(ctx, candidates, rows)
        return sequence


@dataclass(kw_only=True)
class RandomSequence:
    """A random answer over a small alphabet; the target's hidden states [rows, ``width``] are random too."""

    ctx: DraftContext
    random: np.random.Generator
    width: int

    def tokens(self, count: int) -> list[int]:
        """The next ones."""
        found: list[int] = self.random.integers(0, ALPHABET, count).tolist()
        return found

    def hidden(self, drafter: Drafter, start: int, count: int) -> HiddenRows:
        """What ``drafter`` asks for of ``count`` positions."""

        def values(*shape: int) -> torch.Tensor:
            return torch.from_numpy(self.random.standard_normal((count, *shape)).astype(np.float32))

        return HiddenRows(
            start=start, captured=values(len(drafter.capture), self.width) if drafter.capture else None,
            final=values(self.width) if drafter.want_final else None, count=count,
        )  # fmt: skip

    def accept(self, drafter: Drafter, draft: Draft, node: int) -> tuple[DraftContext, Verdict, HiddenRows]:
        """A verification that takes the path down to ``node``; -1: none of the draft."""
        path: list[int] = []
        while node >= 0:
            path.insert(0, node)
            node = int(draft.parents[node])
        outputs = [int(draft.token_ids[node]) for node in path] + self.tokens(1)
        hidden = self.hidden(drafter, self.ctx.root_position, len(outputs))
        if draft.branch is not None:
            hidden = replace(hidden, branch_ids=np.array(self.tokens(len(draft.branch.asked))))
        self.ctx.token_ids += outputs
        return self.ctx, Verdict(path=tuple(path), output_ids=tuple(outputs)), hidden


def check_draft(draft: Draft, budget: int, drafter: Drafter, vocabulary: int, tree: str = "") -> None:
    """Raises ContractBroken for a draft that ``propose`` must not give."""
    nodes = draft.num_nodes
    require(nodes <= budget, f"no more nodes than the budget: {nodes} of {budget}")
    require(len(draft.rows[0]) <= drafter.max_nodes, f"no more rows than max_nodes, {drafter.max_nodes}")
    shapes = {one.shape for one in (draft.token_ids, draft.parents, draft.log_q, draft.survival)}
    require(shapes == {(nodes,)}, "arrays of one length")
    require((draft.token_ids.dtype, draft.parents.dtype) == (np.int32, np.int32), "token_ids and parents are int32")
    require((draft.log_q.dtype, draft.survival.dtype) == (np.float32, np.float32), "log_q and survival are float32")
    require(bool(((draft.parents >= -1) & (draft.parents < np.arange(nodes))).all()), "parents before children")
    edges = list(zip(draft.parents.tolist(), draft.token_ids.tolist(), strict=True))
    require(len(edges) == len(set(edges)), "children of one parent are distinct")
    require(bool(((draft.token_ids >= 0) & (draft.token_ids < vocabulary)).all()), "token ids are the target's")
    require(bool(((draft.survival >= 0) & (draft.survival <= 1)).all()), "survival is a chance")
    above = np.where(draft.parents < 0, 1, draft.survival[draft.parents])
    require(bool((draft.survival <= above).all()), "survival is never above the parent's")
    require(bool((np.isnan(draft.log_q) | (draft.log_q <= 0)).all()), "log_q is a log probability, or NaN")
    require(nodes == 0 or int(depths(draft.parents).max()) <= drafter.depth(tree), "no node is deeper than depth(tree)")


def trees(world: World, name: str, temperature: float = 0.0) -> None:
    """Drafts are trees within their budget through whole answers. Raises ContractBroken."""
    for tree in trees_of(world.make(name)[0], world.setting.plugins):
        drafter, _ = world.make(name)
        random, drafted = np.random.default_rng(7), 0
        sequences = [world.begin(drafter, cut, temperature=temperature, tree=tree) for cut in SEQUENCES]
        for _ in range(STEPS):
            budgets = [int(budget) for budget in random.integers(0, 10, len(sequences))]
            drafts = drafter.propose([sequence.ctx for sequence in sequences], budgets)
            require(len(drafts) == len(sequences), "one draft for each sequence")
            news = []
            for sequence, draft, budget in zip(sequences, drafts, budgets, strict=True):
                check_draft(draft, budget, drafter, world.setting.target.config.vocab_size, tree)
                drafted += draft.num_nodes
                news.append(sequence.accept(drafter, draft, int(random.integers(-1, draft.num_nodes))))
            drafter.observe(news)
        require((drafted > 0) == bool(drafter.default_tree), f"{drafted} nodes drafted with default tree {tree!r}")


def state(world: World, name: str) -> None:
    """Two drafters that take turns over the same pages draft what one would: no request is its own earlier answer.
    Raises ContractBroken."""
    one, pages = world.make(name)
    other, _ = world.make(name, pages)
    single, _ = world.make(name)
    before = dict(vars(one))
    cut: Cut = (1, 30, ())
    turns, plain = world.begin(one, cut), world.begin(single, cut)
    for turn in range(8):
        drafter, next_one = (one, other) if turn % 2 == 0 else (other, one)
        (draft,), (expected,) = drafter.propose([turns.ctx], [8]), single.propose([plain.ctx], [8])
        for field in ("token_ids", "parents", "log_q", "survival"):
            same = np.array_equal(getattr(draft, field), getattr(expected, field), equal_nan=field == "log_q")
            require(same, f"another drafter over the same context and pages drafts the same {field}")
        next_one.observe([turns.accept(drafter, draft, draft.num_nodes - 1)])
        single.observe([plain.accept(single, expected, expected.num_nodes - 1)])
    kept = vars(one).keys() == before.keys() and all(vars(one)[key] is value for key, value in before.items())
    require(kept, "what is known of a sequence is in ctx.state, not in the drafter")


def empty(world: World, name: str) -> None:
    """Raises ContractBroken."""
    drafter, _ = world.make(name)
    require(drafter.propose([], []) == [], "no draft for an empty batch")
    drafter.observe([])


def described(world: World, name: str) -> None:
    """Raises ContractBroken."""
    drafter, pages = world.make(name)
    said = family(name, world.setting.plugins).DESCRIPTION
    require(said.name == drafter.name == name, f"the name is {name} in DESCRIPTION and drafter")
    require(drafter.groups == draft_groups([name], world.setting), "groups(setting) are the drafter's groups")
    require(all(pages.layout(group.name) == group for group in drafter.groups), "the cache holds its groups")
    for count in (1, 17):
        require(drafter.rows_at(count).keys() == {group.name for group in drafter.groups}, "rows_at names every group")
    layers = world.setting.target.config.num_layers
    require(all(0 <= layer < layers for layer in drafter.capture), "capture names layers of the target")
    require(drafter.fingerprint() == world.make(name)[0].fingerprint(), "the fingerprint is the same each time")
    require(said.default_tree == drafter.default_tree, "DESCRIPTION's default tree is the one that is drafted")
    require(bool(said.trees) == bool(said.default_tree), "a family that drafts has kinds of tree and a default")


Part = Callable[[World, str], None]
PARTS: Mapping[str, Part] = {
    **{f"trees, temperature {warmth:g}": partial(trees, temperature=warmth) for warmth in TEMPERATURES},
    "state": state, "empty": empty, "described": described,
}  # fmt: skip


def run(name: str, *, worker: Mapping[str, Any], dtypes: Sequence[str] = DTYPES) -> dict[str, Any]:
    """Every part, in each of ``dtypes``: "kept", or what is not. Raises UnknownName and ConfigError."""
    config, random_heads = with_random_heads(worker_config(worker, (name,)))
    files = resolve(config.model, config.cache_dir or None)
    if files.config.vocab_size < ALPHABET:
        raise ConfigError(f"fewer than {ALPHABET} tokens", field="model", remedy="use tiny")
    found: dict[str, str] = {}
    with one_thread():
        for dtype in dtypes:
            world = World.of(files, dtype, heads=config.heads, options=config.options, plugins=config.plugins)
            for part, work in PARTS.items():
                try:
                    work(world, name)
                    found[f"{part}, {dtype}"] = "kept"
                except ContractBroken as error:
                    found[f"{part}, {dtype}"] = error.message
    return {
        "ok": all(said == "kept" for said in found.values()), "drafter": name, "model": config.model,
        "random_head": name in random_heads, "parts": found,
    }  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """As workers run torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
