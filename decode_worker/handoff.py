"""Landing a handoff: frames of the Prefill stream go into reserved pages; counts and checksums decide what is used."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from pdspec.engine.resources import Resources
from pdspec.errors import TransferDamaged
from pdspec.spec.protocol import Candidates, Drafter
from pdspec.spec.protocol import HiddenRows as TargetRows
from pdspec.telemetry import clock_name
from pdspec.transfer.frames import Begin, Done, DraftStart, First, HiddenRows, Pages
from pdspec.transfer.grpc_stream import PrefillCall
from pdspec.transfer.ledger import HIDDEN
from pdspec.transfer.lossy import decode
from pdspec.transfer.wireformat import one_view
from pdspec.types import DraftPrefill, TokenLogprob


@dataclasses.dataclass(kw_only=True)
class Handed:
    """What a prefill worker handed over; KV rows are in the pages already."""

    epoch: int = 0
    token_id: int = -1
    logprob: TokenLogprob | None = None
    candidates: Candidates | None = None
    rows: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    hidden: list[TargetRows] = dataclasses.field(default_factory=list)
    draft_prefill: DraftPrefill = DraftPrefill.PREFILL  # DECODE: the drafter has yet to see the prompt
    draft_damage: str = ""  # the draft state must be rebuilt
    prefill_worker: str = ""
    kv_bytes: int = 0
    draft_kv_bytes: int = 0
    hidden_bytes: int = 0
    stats: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exposed_ms: float = 0.0  # from the last layer computed to Done; from First to Done where clocks differ


@dataclasses.dataclass(kw_only=True)
class Landing:
    """One stream's way into the pages of one reservation."""

    resources: Resources
    pages: list[int]
    rows: int  # of the prompt that will land; 0 where the first token is the whole answer
    drafter: Drafter
    draft_prefill: DraftPrefill
    on_first: Callable[[int, TokenLogprob | None], bool]  # False: the answer ends here, nothing more is needed
    have_rows: Mapping[str, int] = dataclasses.field(default_factory=dict)  # in the pages already, per group
    handed: Handed = dataclasses.field(default_factory=Handed)

    async def receive(self, call: PrefillCall) -> Handed | None:
        """Land everything up to Done. None when ``on_first`` ended it. Raises what the stream raises, and
        TransferDamaged when the target KV cannot be used."""
        handed, first_at, clock = self.handed, 0.0, ""
        handed.draft_prefill = self.draft_prefill
        async for frame in call:
            match frame:
                case Begin():
                    handed.prefill_worker, clock = frame.worker_id, frame.clock
                    self._check_rows(frame.rows)
                case Pages():
                    self._land(frame)
                case First():
                    first_at = time.monotonic()
                    handed.token_id, handed.logprob = self._known(frame.token_id), frame.logprob
                    if not self.on_first(frame.token_id, frame.logprob):
                        return None
                case DraftStart():
                    self._start(frame)
                case HiddenRows():
                    handed.hidden.append(self._hidden(frame))
                    if len(handed.hidden) > self.rows:
                        raise TransferDamaged(f"{len(handed.hidden)} frames of {self.rows} rows", field="hidden")
                case Done():
                    handed.stats = frame.stats
                    computed_at = frame.stats.get("computed_at_s", 0.0) if clock and clock == clock_name() else 0.0
                    handed.exposed_ms = 1e3 * (time.monotonic() - (computed_at or first_at))
                    self._judge(call, frame)
        return handed

    def _expected(self) -> dict[str, int]:
        """Rows per group at Done (the index table of DESIGN 4)."""
        drafts = self.drafter.rows_at(self.rows) if self.rows and self.draft_prefill is DraftPrefill.PREFILL else {}
        return {self.resources.runner.group.name: self.rows, **drafts}

    def _check_rows(self, rows: Mapping[str, int]) -> None:
        if dict(rows) != self._expected():
            raise TransferDamaged(
                f"the prefill worker means to send {dict(rows)}, due are {self._expected()}", field="begin.rows"
            )

    def _land(self, frame: Pages) -> None:
        due, have = self._expected().get(frame.group, -1), self.have_rows.get(frame.group, 0)
        if frame.start + frame.count > due or frame.start < have:
            raise TransferDamaged(
                f"rows {frame.start}..{frame.start + frame.count - 1} of {frame.group}, {have}..{due - 1} are due",
                field="pages.start",
            )
        group, payload = self.resources.runner.group, one_view(frame.payload)
        if frame.group == group.name and self.resources.config.lossy_wire:
            payload = decode(payload, group, frame.start, frame.count, frame.head_count)
        try:
            self.resources.cache.write_rows(
                frame.group,
                frame.layer,
                self.pages,
                frame.start,
                frame.start + frame.count,
                payload,
                frame.head_start,
                frame.head_count,
            )
        except (ValueError, IndexError, KeyError) as error:
            raise TransferDamaged(str(error), field=f"pages.{frame.group}") from error

    def _known(self, token_id: int) -> int:
        size = self.resources.files.config.vocab_size
        if token_id >= size:
            raise TransferDamaged(f"token id {token_id} of a vocabulary of {size}", field="first.token_id")
        return token_id

    def _start(self, frame: DraftStart) -> None:
        ids = frame.token_ids
        if len(ids) and ids.min() >= 0 and ids.max() < self.resources.files.config.vocab_size:
            self.handed.candidates = Candidates(token_ids=frame.token_ids, log_q=frame.log_q, score=frame.score)
        self.handed.rows = {name: torch.from_numpy(np.array(row, np.float32)) for name, row in frame.rows.items()}

    def _hidden(self, frame: HiddenRows) -> TargetRows:
        """The inverse of the prefill worker's frame: captured layers [rows, C, H], then the final state [rows, H]."""
        hidden, layers = self.resources.files.config.hidden_size, len(self.drafter.capture)
        width = frame.count * hidden
        payload = one_view(frame.payload)
        size = payload.nbytes
        if frame.dtype != "float32" or size != 4 * width * (layers + self.drafter.want_final):
            raise TransferDamaged(
                f"{size} bytes of {frame.dtype} for {frame.count} hidden rows", field="hidden.payload"
            )
        if frame.start + frame.count > self.rows:
            raise TransferDamaged(f"rows up to {frame.start + frame.count} of {self.rows}", field="hidden.count")
        tensor = torch.from_numpy(np.frombuffer(payload, np.float32).copy())
        captured = tensor[: width * layers].view(frame.count, layers, hidden) if layers else None
        final = tensor[width * layers :].view(frame.count, hidden) if self.drafter.want_final else None
        return TargetRows(start=frame.start, captured=captured, final=final)

    def _judge(self, call: PrefillCall, done: Done) -> None:
        """Target damage refuses the handoff; damage to draft state alone is noted and rebuilt."""
        target, ledger, handed = self.resources.runner.group.name, call.ledger, self.handed
        damaged = ledger.damaged(done)
        if target in damaged:
            raise TransferDamaged(damaged[target], field=f"done.{target}", remedy="the KV is not used; prefill again")
        if handed.token_id < 0:
            raise TransferDamaged("no First before Done", field="first")
        for name, rows in self._expected().items():
            layout = self.resources.cache.layout(name)
            try:
                ledger.check_covered(
                    name, layers=layout.num_layers, heads=layout.num_kv_heads,
                    start=min(self.have_rows.get(name, 0), rows), stop=rows,
                )  # fmt: skip
            except TransferDamaged:
                if name == target:
                    raise
                damaged.setdefault(name, "rows are missing")
        if self.draft_prefill is DraftPrefill.DECODE and (self.drafter.capture or self.drafter.want_final):
            self._check_hidden(damaged)
        handed.draft_damage = "; ".join(f"{group}: {what}" for group, what in damaged.items())
        handed.kv_bytes, handed.hidden_bytes = ledger.moved(target), ledger.moved("hidden")
        handed.draft_kv_bytes = sum(ledger.moved(group.name) for group in self.drafter.groups)

    def _check_hidden(self, damaged: dict[str, str]) -> None:
        due = self.have_rows.get(HIDDEN, 0)
        for rows in self.handed.hidden:
            if rows.start != due:
                damaged["hidden"] = f"rows from {rows.start} where {due} was due"
                return
            part = rows.captured if rows.captured is not None else rows.final
            due += 0 if part is None else len(part)
        if due != self.rows:
            damaged["hidden"] = f"{due} rows of {self.rows}"
