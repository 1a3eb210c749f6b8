"""The drafter protocol: two verbs, ``propose`` and ``observe``; prefill is observing the prompt.

Notation of the papers: target p, draft q. Prompt t_0..t_{n-1}; h_i is the target's hidden state of row i.
The *root* is the last output token: known to the client, not yet in the target KV. A draft is a tree below
the root; a chain is a tree. A depth-1 node stands for absolute position ``root_position + 1``.

Coupling (DESIGN 5): position t of a request has fixed Gumbel noise g[t, v]; a drafter proposes the best of
``log q + g``, the target's token is ``argmax(log p + g)``. Any choice of draft is lossless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from pdspec.spec.chooser import Chooser, Seeded
from pdspec.types import CacheGroup, SamplingParams

MAX_DEPTH = 256  # of any tree


@dataclass(frozen=True, kw_only=True, eq=False)
class Law:
    """q at one node: what its children were drawn from without replacement, in the order of their indices."""

    token_ids: np.ndarray  # [D] int64, distinct target ids
    log_q: np.ndarray  # [D] float32, normalised


@dataclass(frozen=True, kw_only=True)
class Branch:
    """M rows below the root that a drafter wants in the verification's forward to learn what the target would say
    after K of them (lookahead decoding). A tree of its own beside the draft's: never verified, nor accepted."""

    token_ids: np.ndarray  # [M] int32
    parents: np.ndarray  # [M] int32, -1 for the root
    asked: np.ndarray  # [K] int32, indices of rows


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A tree of N nodes below the root, parents before children.

    ``parents[i]`` is the index of node i's parent, -1 for the root. Children of one parent are distinct.
    ``log_q[i]`` is the drafter's log probability of the node given its parent (temperature applied, no noise),
    NaN where the drafter has none. ``survival[i]`` estimates that the whole path down to i is accepted. ``laws`` has
    the law of every inner node (-1: the root) of a draft that was drawn, and nothing for one that was chosen.
    """

    token_ids: np.ndarray  # [N] int32
    parents: np.ndarray  # [N] int32
    log_q: np.ndarray  # [N] float32
    survival: np.ndarray  # [N] float32, never above the parent's
    laws: Mapping[int, Law] = field(default_factory=dict)
    branch: Branch | None = None

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.token_ids)

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, parents) [N + M] int32 of all that stands below the root in one forward: nodes, then branch."""
        if self.branch is None:
            return self.token_ids, self.parents
        beside = np.where(self.branch.parents < 0, np.int32(-1), self.branch.parents + np.int32(self.num_nodes))
        return np.concatenate((self.token_ids, self.branch.token_ids)), np.concatenate((self.parents, beside))

    def part(self, kept: np.ndarray) -> Draft:
        """The draft of the nodes ``kept`` [M] (ascending, closed under parents)."""
        renumbered = np.full(self.num_nodes + 1, -1, np.int32)  # the last entry is the root's: index -1
        renumbered[kept] = np.arange(len(kept), dtype=np.int32)
        parents = renumbered[self.parents[kept]]
        inner = {-1, *kept.tolist()} if self.laws else set()
        return Draft(
            token_ids=self.token_ids[kept], parents=parents, log_q=self.log_q[kept], survival=self.survival[kept],
            laws={int(renumbered[node]): law for node, law in self.laws.items() if node in inner},
            branch=self.branch,
        )


def empty_draft() -> Draft:
    """The draft of zero nodes: the verification is then a plain decode step."""
    return Draft(
        token_ids=np.empty(0, np.int32),
        parents=np.empty(0, np.int32),
        log_q=np.empty(0, np.float32),
        survival=np.empty(0, np.float32),
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of one verification. ``path`` are the accepted node indices, root side first; ``output_ids``
    the accepted tokens plus one more (*recovered* after a rejection, *bonus* after a fully accepted path)."""

    path: tuple[int, ...]
    output_ids: tuple[int, ...]

    @property
    def num_accepted(self) -> int:
        """a."""
        return len(self.path)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """First draft tokens of a sequence, as shipped in DraftStart: the W best ids by log q + g[n+1].

    ``score`` is log-softmax of (log q + g) over the draft vocabulary at those ids: what trees rank by.
    """

    token_ids: np.ndarray  # [W] int32, target ids, best first
    log_q: np.ndarray  # [W] float32
    score: np.ndarray  # [W] float32


@dataclass(kw_only=True)
class DraftContext:
    """What a drafter may know of one running sequence. Owned by the engine; the drafter keeps its own part
    in ``state`` and nowhere else, so that dropping the context drops everything. Its noise is
    ``Seeded(*noise_key)``, unless a check puts ``other_chooser`` in its place."""

    request_id: str
    sampling: SamplingParams
    noise_key: tuple[int, int]  # (seed, sample)
    token_ids: list[int]  # prompt and output, the root last
    pages: list[int]  # page ids, shared by all cache groups
    prompt_len: int
    tree: str  # tree specification of this request
    deepest: int = MAX_DEPTH  # no draft is deeper, whatever the tree: set by the engine where it budgets
    observed: int = -1  # the root when the drafter last observed; -1: it has not since it took over
    state: Any = None  # the drafter's own per-sequence state
    metrics: dict[str, float] = field(default_factory=dict)
    other_chooser: Chooser | None = None

    @property
    def chooser(self) -> Chooser:
        """Where all randomness of the answer comes from."""
        return self.other_chooser or Seeded(*self.noise_key)

    @property
    def root_position(self) -> int:
        """Absolute position of the last output token."""
        return len(self.token_ids) - 1


@dataclass(frozen=True, kw_only=True)
class HiddenRows:
    """Target hidden states of consecutive positions ``start .. start+num_rows-1`` of one sequence; after a verification
    also what the target's best token is after each row that the draft's branch asked about."""

    start: int
    captured: torch.Tensor | None  # [rows, C, H] float32
    final: torch.Tensor | None  # [rows, H] float32
    count: int = 0  # of rows, where no hidden state was asked for: a drafter may go by tokens alone
    branch_ids: np.ndarray | None = None  # [K] int64

    @property
    def num_rows(self) -> int:
        """How many positions."""
        part = self.captured if self.captured is not None else self.final
        return self.count if part is None else len(part)

    def copied(self, start: int, stop: int) -> HiddenRows:
        """A copy of the rows of positions ``start .. stop-1``, which are among these."""
        rows = slice(start - self.start, stop - self.start)
        return HiddenRows(
            start=start,
            captured=None if self.captured is None else self.captured[rows].clone(),
            final=None if self.final is None else self.final[rows].clone(),
            count=stop - start,
        )

    def after(self, count: int) -> HiddenRows:
        """Without the first ``count`` rows."""
        return HiddenRows(
            start=self.start + count, captured=None if self.captured is None else self.captured[count:],
            final=None if self.final is None else self.final[count:], count=max(0, self.count - count),
        )

    @classmethod
    def joined(cls, parts: Sequence[HiddenRows]) -> HiddenRows:
        """The rows of several sequences, one after the other, to be worked on together."""
        captured = [part.captured for part in parts if part.captured is not None]
        final = [part.final for part in parts if part.final is not None]
        return cls(
            start=parts[0].start, captured=torch.cat(captured) if captured else None,
            final=torch.cat(final) if final else None, count=sum(part.num_rows for part in parts),
        )


class Drafter(Protocol):
    """One draft family with its weights. Stateless between calls but for its KV pages, ``ctx.state``, and what
    it may keep of earlier answers under a bound of its own (suffix).

    ``groups`` are its cache groups (none for model-free drafters); ``capture``/``want_final`` say which target
    hidden states ``observe`` and ``prefill`` need. ``rows_at(n)`` is the number of draft KV rows that are final
    per group once t_n is known (the index table of DESIGN 4). A draft row i reads tokens up to t_{i + ahead}; behind
    prompt rows that are in the pages already ``prefill`` begins ``carry`` hidden rows before their end, and makes again
    the rows that read the tokens behind it. A drafter whose decoded rows are not those that a prefill would make says
    ``stable_kv`` False.
    """

    name: str
    groups: tuple[CacheGroup, ...]
    capture: tuple[int, ...]
    want_final: bool
    max_nodes: int  # extra KV slots a proposal, its branch included, may need
    ahead: int
    carry: int
    stable_kv: bool
    default_tree: str  # of requests that name none; empty: this family drafts nothing

    def fingerprint(self) -> str:
        """Hash of content, geometry, vocabulary map and padding; equal on both sides of a handoff."""

    def depth(self, tree: str) -> int:
        """Deepest node under a request's tree. Raises UnknownName or InvalidRequest for a tree it cannot draft."""

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """Final rows per group when tokens t_0..t_{num_tokens-1} and t_{num_tokens} are known."""

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Extend the draft KV by the rows that ``hidden`` and the tokens known so far (``ctx.token_ids``)
        make final. Called chunk by chunk, in order; the last call has t_n in ``ctx.token_ids``. Without a state the
        first chunk may begin anywhere: the rows before are in the pages."""

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """After the last ``prefill``: what DraftStart carries (first candidates, named float32 rows)."""

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """The other end of ``start``, on the worker that decodes. Draft KV has landed in ``ctx.pages``."""

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """A draft of at most ``budgets[i]`` nodes for each sequence."""

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """After a verification: ``ctx.token_ids`` already holds the outputs; ``hidden`` has the target's rows of
        the root and the accepted path. Rebuilds the draft KV of committed tokens (``stable_kv``)."""
