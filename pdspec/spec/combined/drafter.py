"""Two drafters as one: a credible suffix match drafts, and where there is none the head does.

    propose    suffix for all ──▶ expected length ≥ the head's? ──▶ its draft
                                          └─ no ──▶ head for those sequences, in one batch
    observe    both, always: the head's state is rebuilt from the target's rows whoever drafted

Expected is what evidence of this sequence says: tokens accepted per unit of survival that suffix promised, against
tokens accepted per draft of the head. Only earlier verifications decide, never what the head drew: under ``rejection``
a choice that looked at the draw would bias it. Under ``budget: goodput`` the engine chooses instead
(``engine/choosing.py``), and tells suffix and head apart what was verified.

Where a request names no tree, suffix drafts this family's and the head its own default; a named one holds for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pdspec.spec.protocol import Candidates, Draft, DraftContext, Drafter, HiddenRows, Verdict
from pdspec.spec.suffix.drafter import SuffixDrafter
from pdspec.spec.survival import Calibrated
from pdspec.spec.tree import ChainTree, DynamicTree, parse_tree
from pdspec.types import CacheGroup

# Before there is evidence: suffix's survival sums to about four times what is accepted (``suffix/drafter.py``), and a
# small head's draft of two has half a token accepted.
_SUFFIX_PRIOR, _HEAD_PRIOR, _PRIOR_WEIGHT = 0.25, 0.5, 4.0


@dataclass(kw_only=True)
class CombinedState:
    """One sequence: the state of either drafter, whose draft is under verification, and what became of earlier ones."""

    head: Any = None
    suffix: Any = None
    promised: float = 0.0  # survival of the suffix's draft under verification; 0: it is not suffix's
    head_drafted: bool = False
    suffix_promised: float = _PRIOR_WEIGHT
    suffix_accepted: float = _PRIOR_WEIGHT * _SUFFIX_PRIOR
    head_drafts: float = _PRIOR_WEIGHT
    head_accepted: float = _PRIOR_WEIGHT * _HEAD_PRIOR

    def credible(self, promised: float) -> bool:
        """Whether a suffix draft of this survival is expected to have more tokens accepted than one of the head."""
        expected = promised * self.suffix_accepted / self.suffix_promised
        return promised > 0 and expected >= self.head_accepted / self.head_drafts


Observed = Sequence[tuple[DraftContext, Verdict, HiddenRows]]


class CombinedDrafter:
    """``head`` and ``suffix`` for the same sequences. ``ctx.metrics`` counts the drafts of each
    (``combined_suffix``, ``combined_head``). The head must rebuild its state from hidden rows alone: what it is told
    was accepted may be of a draft that it never made."""

    name = "combined"

    def __init__(self, head: Drafter, suffix: SuffixDrafter, *, tree: str) -> None:
        self.head, self.suffix = head, suffix
        self.groups: tuple[CacheGroup, ...] = head.groups
        self.capture, self.want_final = head.capture, head.want_final
        self.ahead, self.carry, self.stable_kv = head.ahead, head.carry, head.stable_kv
        self.max_nodes = max(head.max_nodes, suffix.max_nodes)
        self.default_tree = tree
        self.target_matches = bool(getattr(head, "target_matches", True))

    def use_survival(self, mode: str) -> None:
        """Both begin anew in this mode."""
        for drafter in (self.head, self.suffix):
            if isinstance(drafter, Calibrated):
                drafter.use_survival(mode)

    def fingerprint(self) -> str:
        """The head's: suffix ships nothing."""
        return f"combined/1 {self.head.name} {self.head.fingerprint()}"

    def depth(self, tree: str) -> int:
        """The deeper of the two. Raises UnknownName or InvalidRequest for a tree that the head cannot draft."""
        return max(self.head.depth(self._head_tree(tree)), self.suffix.depth(self._suffix_tree(tree)))

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """The head's."""
        return self.head.rows_at(num_tokens)

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """The head's."""
        state = self._state(ctx)
        view = self._head_view(ctx)
        self.head.prefill(view, hidden)
        state.head = view.state

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """The head's."""
        view = self._head_view(ctx)
        started = self.head.start(view)
        self._state(ctx).head = view.state
        return started

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """The head takes over what ``start`` gave, and suffix makes its tree. Raises as the head."""
        head = self._head_view(ctx)
        self.head.resume(head, candidates, rows)
        ctx.state = CombinedState(head=head.state)
        suffix = self._suffix_view(ctx)
        self.suffix.resume(suffix, None, {})
        ctx.state.suffix = suffix.state

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """Suffix's drafts where they are credible, the head's in their place elsewhere."""
        drafts = self.suffix_drafts(batch, budgets)
        for ctx, draft in zip(batch, drafts, strict=True):
            promised = float(draft.survival.sum())
            ctx.state.promised = promised if ctx.state.credible(promised) else 0.0
        left = [i for i, ctx in enumerate(batch) if ctx.state.promised == 0.0]
        for i, draft in zip(left, self.head_drafts([batch[i] for i in left], [budgets[i] for i in left]), strict=True):
            drafts[i] = draft
        for ctx, draft in zip(batch, drafts, strict=True):
            ctx.state.head_drafted = draft.num_nodes > 0 and ctx.state.promised == 0.0
            self.count(ctx, suffix=ctx.state.promised > 0, head=ctx.state.head_drafted)
        return drafts

    def suffix_drafts(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """Suffix's alone, empty where nothing matches, for whoever chooses the family (``engine/choosing.py``)."""
        views = [self._suffix_view(ctx) for ctx in batch]
        drafts = self.suffix.propose(views, budgets)
        for ctx, view in zip(batch, views, strict=True):
            self._state(ctx).suffix = view.state
        return drafts

    @staticmethod
    def count(ctx: DraftContext, *, suffix: bool, head: bool) -> None:
        """Note in ``ctx.metrics`` who drafts."""
        for name, drafted in (("suffix", suffix), ("head", head)):
            ctx.metrics[f"combined_{name}"] = ctx.metrics.get(f"combined_{name}", 0.0) + drafted

    @property
    def as_head(self) -> HeadOf:
        """Its head alone."""
        return HeadOf(self)

    def head_drafts(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """The head's alone; it must have observed all that came before."""
        heads = [self._head_view(ctx) for ctx in batch]
        drafts = self.head.propose(heads, budgets)
        for ctx, view in zip(batch, heads, strict=True):
            ctx.state.head = view.state
        return drafts

    def observe(self, batch: Observed) -> None:
        """Both learn, and whoever drafted is judged."""
        for ctx, verdict, _ in batch:
            state = self._state(ctx)
            if state.promised > 0:
                state.suffix_promised += state.promised
                state.suffix_accepted += verdict.num_accepted
            elif state.head_drafted:
                state.head_drafts += 1
                state.head_accepted += verdict.num_accepted
            state.promised, state.head_drafted = 0.0, False
        self.observe_head(batch)
        self.observe_suffix(batch)

    def observe_suffix(self, batch: Observed) -> None:
        """The tokens alone: the head's rows may wait."""
        views = [(self._suffix_view(ctx), verdict, hidden) for ctx, verdict, hidden in batch]
        self.suffix.observe(views)
        for (ctx, _, _), (view, _, _) in zip(batch, views, strict=True):
            ctx.state.suffix = view.state

    def observe_head(self, batch: Observed) -> None:
        """The head's part of ``observe``."""
        views = [(self._head_view(ctx), verdict, hidden) for ctx, verdict, hidden in batch]
        self.head.observe(views)
        for (ctx, _, _), (view, _, _) in zip(batch, views, strict=True):
            ctx.state.head = view.state

    def _state(self, ctx: DraftContext) -> CombinedState:
        if ctx.state is None:
            ctx.state = CombinedState()
        state: CombinedState = ctx.state
        return state

    def _head_view(self, ctx: DraftContext) -> DraftContext:
        """The sequence as the head knows it: same tokens, pages and metrics, a state of its own."""
        return replace(ctx, state=self._state(ctx).head, tree=self._head_tree(ctx.tree))

    def _suffix_view(self, ctx: DraftContext) -> DraftContext:
        return replace(ctx, state=self._state(ctx).suffix, tree=self._suffix_tree(ctx.tree))

    def _head_tree(self, tree: str) -> str:
        return self.head.default_tree if tree in ("", self.default_tree) else tree

    def _suffix_tree(self, tree: str) -> str:
        """As many nodes as the request's tree, in a shape that suffix drafts."""
        spec = parse_tree(tree or self.default_tree)
        nodes = min(spec.max_nodes, self.suffix.max_nodes)
        if isinstance(spec, ChainTree):
            return f"chain({nodes})"
        top_k = spec.top_k if isinstance(spec, DynamicTree) else max(spec.ranks) + 1
        return f"dynamic({min(spec.depth, nodes)},{min(top_k, nodes)},{nodes})"


class HeadOf:
    """The two verbs of a combined drafter's head, where somebody else chooses between it and suffix."""

    def __init__(self, drafter: CombinedDrafter) -> None:
        self._drafter = drafter

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """See Drafter."""
        drafts = self._drafter.head_drafts(batch, budgets)
        for ctx, draft in zip(batch, drafts, strict=True):
            self._drafter.count(ctx, suffix=False, head=draft.num_nodes > 0)
        return drafts

    def observe(self, batch: Observed) -> None:
        """See Drafter."""
        self._drafter.observe_head(batch)
