"""The decode worker's draft state against the paper: after the handoff and after each verification its draft KV and the
logits of its next draft token equal a recompute from the committed tokens alone.

The recompute shares no code with what it checks: target features come from transformers, the head is the dense one of
``eagle1_reference``, ``eagle3_reference`` or ``mtp_reference``, both in float64. Rows are stable and not padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from pdspec.config import WorkerConfig
from pdspec.engine.sequence import DecodeSequence
from pdspec.engine.serving import RunningWorker
from pdspec.model.loader import load_weights, resolve
from pdspec.model.reference import reference_model
from pdspec.spec.eagle1 import family as eagle1
from pdspec.spec.eagle3 import family as eagle3
from pdspec.spec.family import Setting
from pdspec.spec.heads import find_head
from pdspec.spec.mtp import family as mtp
from pdspec.study.eagle1_reference import PaperEagle1
from pdspec.study.eagle3_reference import PaperHead
from pdspec.study.mtp_reference import PaperMtp
from pdspec.study.pair import Pair
from pdspec.study.parity import first_drafted
from pdspec.telemetry import usable_cores
from pdspec.types import GenerateRequest

Progress = Callable[[str], object]
DRAFTER = "eagle3"
FAMILIES = ("eagle1", "eagle2", "eagle3", "mtp")  # for which there is a dense head
TREES = (("chain(4)", "chain(2)", "chain(1)"), ("dynamic(4,4,8)", "dynamic(2,4,8)", "dynamic(1,4,4)"))
MODES = ("prefill", "decode")
VERIFICATIONS = 20
DEEPEST = 4  # of TREES
BAR = 1e-4
PAGES = {"prefill": {"chunk": 24, "page_size": 4}, "decode": {"page_size": 16}}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a sequence had before one step: committed tokens, root last; its draft KV rows as bytes, by cache group; the
    logits [draft vocabulary] of its next draft token, where the state has what they come from; its best first draft
    tokens (target ids), where they are known."""

    tokens: tuple[int, ...]
    kv: tuple[bytes, ...]
    logits: torch.Tensor | None
    first_ids: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest absolute differences; ``first`` of the scores of the first draft tokens chosen from those of the best."""

    kv: float
    logits: float
    first: float

    @property
    def largest(self) -> float:
        """Of all three; NaN counts as infinite."""
        values = (self.kv, self.logits, self.first)
        return max(value if value == value else float("inf") for value in values)


class Reference:
    """Target and head by other code. ``config`` names model and head of ``drafter`` (one of FAMILIES). Raises what
    ``find_head`` raises."""

    def __init__(self, config: WorkerConfig, drafter: str = DRAFTER) -> None:
        files = resolve(config.model, config.cache_dir or None)
        setting = Setting(target=files, dtype=config.dtype, heads=config.heads, options=config.options)
        if drafter == "eagle2" and "eagle2" not in config.heads:
            drafter = "eagle1"
        where, weights = find_head(drafter, config.heads, setting.identity), load_weights(files, "float32")
        embedding = weights["model.embed_tokens.weight"]
        lm_head = weights.get("lm_head.weight", embedding)
        self._fused: tuple[int, ...] = ()  # none: the head reads the final state
        self.paper: PaperHead | PaperEagle1 | PaperMtp
        if drafter == "eagle3":
            head = eagle3.open_head(where, setting)
            self._fused, self.paper = head.config.fused_layers, PaperHead(head, embedding, lm_head)
        elif drafter == "mtp":
            self.paper = PaperMtp(mtp.open_head(where, setting), embedding, lm_head)
        else:
            self.paper = PaperEagle1(eagle1.open_head(where, setting), embedding, lm_head)
        self._target = reference_model(files, "float32").double()

    @torch.inference_mode()
    def compare(self, snapshot: Snapshot) -> Difference:
        """All final rows of all groups, see the index table of the handoff. Raises ValueError for another number of
        rows."""
        tokens = list(snapshot.tokens)
        states = self._target(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        hidden = torch.stack([states[layer][0] for layer in self._fused], 1) if self._fused else states[-1][0]
        if isinstance(self.paper, PaperMtp):
            kv, logits = self.paper.committed(tokens, hidden), self.paper.logits(tokens, hidden, ())
        else:
            kv, logits = [self.paper.committed(tokens, hidden)[0]], self.paper.log_q(tokens, hidden, ())
        first = 0.0
        if snapshot.first_ids is not None:
            best = logits.topk(len(snapshot.first_ids)).values
            where = {token: index for index, token in enumerate(self.paper.target_ids.tolist())}
            chosen = logits[[where[token] for token in snapshot.first_ids]]
            first = float((chosen - best).abs().max())
        return Difference(
            kv=max(_apart(found, wanted) for found, wanted in zip(snapshot.kv, kv, strict=True)),
            logits=0.0 if snapshot.logits is None else float((snapshot.logits.double() - logits).abs().max()),
            first=first,
        )  # fmt: skip


def _apart(found: bytes, wanted: torch.Tensor) -> float:
    """The largest difference of rows. Raises ValueError for another number of them."""
    got = torch.frombuffer(bytearray(found), dtype=torch.float32) if found else torch.empty(0)
    if got.numel() != wanted.numel():
        raise ValueError(f"{got.numel()} numbers of draft KV where {wanted.numel()} are due")
    largest = float((got.view(wanted.shape).double() - wanted).abs().max()) if got.numel() else 0.0
    return largest if largest == largest else float("inf")


@contextmanager
def watching(worker: RunningWorker, limit: int) -> Iterator[dict[str, list[Snapshot]]]:
    """Snapshots by request id, taken on a decode worker's engine thread before each of a sequence's first ``limit``
    steps, for as long as the block."""
    host, found = worker.engine.host, dict[str, list[Snapshot]]()
    real = host.decode.step

    def step(sequences: Sequence[DecodeSequence]) -> Any:
        for sequence in sequences:
            taken = found.setdefault(sequence.ctx.request_id, [])
            if len(taken) < limit:
                taken.append(_take(host.resources.cache, sequence))
        return real(sequences)

    worker.engine.post(lambda: setattr(host.decode, "step", step)).result()
    try:
        yield found
    finally:
        worker.engine.post(lambda: delattr(host.decode, "step")).result()


def _take(cache: Any, sequence: DecodeSequence) -> Snapshot:
    ctx, drafter = sequence.ctx, sequence.drafter
    candidates, feature = ctx.state.candidates, ctx.state.feature
    with torch.inference_mode():
        known = not bool(feature[:, 0].isnan().any())  # one MTP module ships nothing but the first tokens
        logits = drafter.model.logits(feature)[0].clone() if known else None  # type: ignore[attr-defined]
    rows = drafter.rows_at(ctx.root_position)
    return Snapshot(
        tokens=tuple(ctx.token_ids), logits=logits,
        kv=tuple(bytes(cache.read_rows(name, 0, list(ctx.pages), 0, count)) for name, count in rows.items()),
        first_ids=None if candidates is None else tuple(candidates.token_ids.tolist()),
    )  # fmt: skip


def draft_state(
    config: WorkerConfig, requests: Sequence[GenerateRequest], progress: Progress, *, drafter: str = DRAFTER,
    accepting: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The part of the report: greedy ``requests``, each with every tree and draft prefill on either side, in float32.
    ``ok`` when every state is within ``BAR``, and enough of them were seen with something accepted between (where the
    head is ``accepting``: a random one need not be)."""
    with Pair(
        config.replace(dtype="float32"), prefill_changes=PAGES["prefill"], decode_changes=PAGES["decode"]
    ) as pair:
        made = pair.decode.engine.host.resources.drafters[drafter]
        asked = [
            replace(
                request, request_id=f"{request.request_id} {mode} {tree}", drafter=drafter, tree=tree,
                draft_prefill=mode, trace=True, sampling=replace(
                    request.sampling, temperature=0.0, ignore_eos=True,
                    max_tokens=(VERIFICATIONS + 1) * (DEEPEST + 1) + 2,
                ),
            )
            for request in requests for mode in MODES for tree in (first_drafted(made, trees) for trees in TREES)
        ]  # fmt: skip
        with watching(pair.decode, VERIFICATIONS + 1) as found:
            pair.ask(asked)
    torch.set_num_threads(config.threads or usable_cores())
    reference, result = Reference(config, drafter), []
    for request in asked:
        result += [reference.compare(snapshot) for snapshot in found[request.request_id]]
        progress(f"  {request.request_id}: {max(one.largest for one in result):.2e} at most so far")
    torch.set_num_threads(1)
    return verdict(result, found, len(asked), accepting=accepting)


def verdict(
    differences: Sequence[Difference], found: dict[str, list[Snapshot]], requests: int, *, accepting: bool = True
) -> dict[str, Any]:
    """The part's report over all states of ``requests`` answers."""
    short = [name for name, states in found.items() if len(states) <= VERIFICATIONS]
    # two tokens and more from one state to the next: something was accepted
    accepted = sum(
        max(0, len(b.tokens) - len(a.tokens) - 1)
        for states in found.values() for a, b in pairwise(states)
    )  # fmt: skip
    largest = max((one.largest for one in differences), default=float("inf"))
    return {
        "ok": largest <= BAR and not short and len(found) == requests and (accepted > 0 or not accepting),
        "largest_difference": largest,
        "largest_kv": max((one.kv for one in differences), default=None),
        "largest_logits": max((one.logits for one in differences), default=None),
        "states": len(differences), "answers": len(found), "verifications_each": VERIFICATIONS,
        "accepted_between": accepted, "too_few_verifications": short,
    }  # fmt: skip
