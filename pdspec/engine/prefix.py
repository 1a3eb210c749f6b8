"""What sequences take from the prefix cache and leave in it.

    reserve   find the longest cached beginning ─▶ share its pages, copy the one that is written to, allocate the rest
    compute   from the first row that is not there; the draft rows that read new tokens are made from kept hidden rows
    keep      full pages whose rows are final, while a prompt is computed, when it has landed, when its answer ends

Shared pages are never written. With a hit of h rows, and a drafter that carries N hidden rows over a cut, the rows from
h-N on are written again (draft rows, or, where no hidden rows were kept, target rows with the bits they had), so they
lie in a page of the sequence's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pdspec.cache.pool import PagePool, pages_for
from pdspec.cache.prefix import CachedPage, PageKeys, PrefixIndex
from pdspec.engine.claims import Claims, Wake
from pdspec.engine.resources import Resources
from pdspec.spec.protocol import DraftContext, Drafter, HiddenRows
from pdspec.types import GenerateRequest


class Boundaries:
    """The last ``carry`` hidden rows before each page's end, of one sequence, for as long as nobody has taken them."""

    def __init__(self, carry: int, page_size: int) -> None:
        self._carry, self._page_size = carry, page_size
        self._tail: HiddenRows | None = None
        self._rows: dict[int, HiddenRows] = {}

    def add(self, hidden: HiddenRows) -> None:
        """Rows that follow those added before; others begin anew."""
        if not self._carry or not hidden.num_rows:
            return
        tail, start, stop = self._tail, hidden.start, hidden.start + hidden.num_rows
        if tail is not None and tail.start + tail.num_rows == start:
            hidden = HiddenRows.joined([tail, hidden])
        for end in range((start // self._page_size + 1) * self._page_size, stop + 1, self._page_size):
            if end - self._carry >= hidden.start:
                self._rows[end] = hidden.copied(end - self._carry, end)
        self._tail = None
        if self._carry > 1:
            self._tail = hidden.copied(max(hidden.start, stop - self._carry + 1), stop)

    def take(self, end: int) -> HiddenRows | None:
        """Those before row ``end``."""
        return self._rows.pop(end, None)


@dataclass(kw_only=True, eq=False)
class Prefix:
    """One sequence's part. ``rows`` target rows were there when it began; ``first`` is the first row that it may write.
    ``hidden`` are the hidden rows before ``rows``, where they were kept."""

    keys: PageKeys
    groups: frozenset[str]
    ahead: int
    carry: int
    boundaries: Boundaries
    rows: int = 0
    first: int = 0
    hidden: HiddenRows | None = None
    chain: list[CachedPage] = field(default_factory=list)  # its pages in the cache, from the first on

    @property
    def start(self) -> int:
        """The first target row to be computed."""
        return self.rows if self.hidden is not None or not self.carry else max(0, self.rows - self.carry)

    def shared_rows(self, page_size: int) -> int:
        """Rows of pages that others may read."""
        return max(self.first // page_size, len(self.chain)) * page_size


class Prefixes:
    """The prefix cache of one engine. ``drafts`` False where somebody else makes the draft rows. Engine thread only."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.pool: PagePool = resources.pool
        mode, numerics = resources.config.prefix_cache, resources.fingerprint["numerics"]
        self.enabled = mode != "off"
        self.decoded = mode == "all" or (mode == "auto" and numerics != "fast")
        target = f"{resources.fingerprint['target']} {numerics}"
        self.index = PrefixIndex(self.pool, target)
        self.claims = Claims()
        self.queried = self.hit = 0  # prompt tokens

    def begin(self, request: GenerateRequest, drafter: Drafter, *, drafts: bool = True) -> Prefix:
        """Of a sequence that holds nothing yet. ``drafts``: its draft rows are wanted here."""
        drafts = drafts and request.sampling.max_tokens > 1
        carry = drafter.carry if drafts else 0
        return Prefix(
            keys=self.index.keys(request.cache_salt),
            groups=frozenset(group.name for group in drafter.groups) if drafts else frozenset(),
            ahead=drafter.ahead if drafts else 0,
            carry=carry,
            boundaries=Boundaries(carry if self.enabled else 0, self.pool.page_size),
        )

    def enter(self, prefix: Prefix, ctx: DraftContext, wake: Wake, *, limit: int | None = None) -> bool:
        """Whether a prompt may go on; False, and ``wake`` is called, while another one computes what it lacks of its
        first ``limit`` rows."""
        if not self.enabled:
            return True
        rows = ctx.prompt_len if limit is None else min(limit, ctx.prompt_len)
        keys = prefix.keys.first(ctx.token_ids, rows // self.pool.page_size)
        found = len(self.index.find(keys, ctx.token_ids, prefix.groups))
        return self.claims.enter(prefix, [(key, prefix.groups) for key in keys[found:]], wake)

    def take(self, prefix: Prefix, ctx: DraftContext, count: int, *, limit: int | None = None) -> list[int]:
        """``count`` pages for a sequence, the beginning of its prompt in them as far as it is cached. At least one row
        is computed anyway, and so are those from ``limit`` on. The pool must have ``count`` free pages."""
        size, end = self.pool.page_size, min(ctx.prompt_len - 1, ctx.prompt_len if limit is None else limit)
        found = self._find(prefix, ctx, min(ctx.prompt_len // size, pages_for(end, size)))
        rows = min(end, len(found) * size)
        if rows <= prefix.carry:
            found, rows = [], 0
        prefix.rows, prefix.first = rows, max(0, rows - prefix.carry)
        if rows and rows == len(found) * size and prefix.carry:
            prefix.hidden = found[-1].hidden
        self.queried += ctx.prompt_len
        self.hit += rows
        shared = found[: prefix.first // size]
        written = found[len(shared) : pages_for(rows, size)]
        prefix.chain = list(shared)
        if prefix.hidden is not None:
            prefix.boundaries.add(prefix.hidden)
        self.pool.retain([one.page for one in (*shared, *written)])
        own = self._own(written, prefix.groups, count - len(shared))
        return [*(one.page for one in shared), *own]

    def keep(self, prefix: Prefix, ctx: DraftContext, *, rows: int, made: Mapping[str, int]) -> None:
        """Keep the full pages of a sequence that still holds them: its first ``rows`` target rows are final, and of its
        draft groups as many as ``made`` says."""
        if not self.enabled:
            return
        size = self.pool.page_size
        final = min([rows, *(made.get(name, 0) for name in prefix.groups)]) // size
        keys = prefix.keys.first(ctx.token_ids, final)
        for index in range(len(prefix.chain), final):
            end = (index + 1) * size
            prefix.chain.append(self.index.add(
                keys[index], ctx.pages[index], groups=prefix.groups,
                ahead=tuple(ctx.token_ids[end : end + prefix.ahead]), hidden=prefix.boundaries.take(end),
            ))  # fmt: skip
        self.index.touch(prefix.chain)

    def keep_answer(self, prefix: Prefix, ctx: DraftContext, drafter: Drafter) -> None:
        """``keep`` for a sequence that was being decoded, between two steps or after its last."""
        rows = ctx.root_position if self.decoded else ctx.prompt_len
        observed = max(ctx.prompt_len, ctx.observed) if self.decoded and drafter.stable_kv else ctx.prompt_len
        self.keep(prefix, ctx, rows=rows, made=drafter.rows_at(observed))

    def counts(self) -> dict[str, float]:
        """For Status and metrics: prompt tokens looked up and found, pages kept, pages given up."""
        return {
            "prefix_query_tokens": float(self.queried), "prefix_hit_tokens": float(self.hit),
            "prefix_cached_pages": float(len(self.index)), "prefix_evictions": float(self.index.evictions),
        }  # fmt: skip

    def _find(self, prefix: Prefix, ctx: DraftContext, pages: int) -> list[CachedPage]:
        if not self.enabled:
            return []
        return self.index.find(prefix.keys.first(ctx.token_ids, pages), ctx.token_ids, prefix.groups)

    def _own(self, written: Sequence[CachedPage], groups: frozenset[str], count: int) -> list[int]:
        """``count`` pages of nobody else, the first of them with the rows of ``written``, which are retained."""
        own: list[int] = []
        for one in written:
            if self.pool.free < count - len(own) and self.pool.owners(one.page) == 2:
                self.index.remove(one)  # no room for a copy: it is taken out of the cache instead
                own.append(one.page)
                continue
            own += self.pool.allocate(1)
            for name in (self.resources.runner.group.name, *groups):
                self.resources.cache.copy_page(name, one.page, own[-1])
            self.pool.release([one.page])
        return own + self.pool.allocate(count - len(own))
