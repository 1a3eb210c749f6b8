"""The decode worker's draft state against the paper: after the handoff and after each of 20 verifications, its draft KV
and the logits of its next draft token equal a recompute from the committed tokens alone.

The recompute shares no code with what it checks: target features come from transformers, the head is the dense
float64 one of ``tests/unit/eagle3_reference.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from pdspec.model.files import resolve
from pdspec.model.loader import load_weights
from pdspec.model.reference import reference_model
from pdspec.spec.eagle3.checkpoint import random_head
from pdspec.spec.eagle3.config import GROUP, Eagle3Config
from tests.parity.roles import Roles, request, running
from tests.unit.eagle3_reference import PaperHead

VERIFICATIONS = 20


@dataclass(frozen=True)
class Snapshot:
    """What a sequence had before one step; ``first_ids`` are its best first draft tokens, where they are known."""

    tokens: list[int]
    kv: bytes
    logits: torch.Tensor
    first_ids: list[int] | None


class Reference:
    """Target and head by other code."""

    def __init__(self) -> None:
        files = resolve("tiny")
        self.config = Eagle3Config.for_target(files.config, files.config.vocab_size // 2)
        head = random_head(self.config, 0)
        self.paper = PaperHead(head, load_weights(files, "float32")["model.embed_tokens.weight"])
        self.target = reference_model(files, "float32")

    @torch.inference_mode()
    def check(self, snapshot: Snapshot) -> None:
        """Draft row i reads the features of h_i and t_{i+1}, for all i below the root."""
        rows = len(snapshot.tokens) - 1
        states = self.target(torch.tensor([snapshot.tokens[:-1]]), output_hidden_states=True).hidden_states
        captured = torch.stack([states[layer][0] for layer in self.config.fused_layers], 1)
        kv, _ = self.paper.committed(snapshot.tokens, captured)
        got = torch.frombuffer(bytearray(snapshot.kv), dtype=torch.float32).view(kv.shape)
        assert len(got) == rows
        torch.testing.assert_close(got.double(), kv, atol=1e-4, rtol=0)
        logits = self.paper.log_q(snapshot.tokens, captured, ())
        torch.testing.assert_close(snapshot.logits.double(), logits, atol=1e-4, rtol=0)
        if snapshot.first_ids is not None:
            best = self.paper.target_ids[logits.topk(len(snapshot.first_ids)).indices].tolist()
            assert snapshot.first_ids == best


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    changes = {"prefill": {"chunk": 7, "page_size": 4}, "decode": {"page_size": 16}}
    with running(dtype="float32", heads={"eagle3": "random:0"}, **changes) as roles:
        yield roles


def watch(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Snapshot]]:
    """Snapshots by request id, taken on the engine thread before every decode step."""
    host, found = roles.decode.engine.host, {}
    real = host.decode.step

    def step(sequences):
        for sequence in sequences:
            ctx = sequence.ctx
            state, pages = ctx.state, list(ctx.pages)
            kv = host.resources.cache.read_rows(GROUP, 0, pages, 0, ctx.root_position)
            logits = sequence.drafter.model.logits(state.feature)[0].clone()
            first = None if state.candidates is None else state.candidates.token_ids.tolist()
            taken = Snapshot(list(ctx.token_ids), bytes(kv), logits, first)
            found.setdefault(ctx.request_id, []).append(taken)
        return real(sequences)

    monkeypatch.setattr(host.decode, "step", step)
    return found


@pytest.mark.parametrize("mode", ["prefill", "decode", "alone"])
def test_draft_kv_and_next_logits_equal_a_recompute_after_every_verification(roles, reference, monkeypatch, mode):
    found = watch(roles, monkeypatch)
    sampling = {"max_tokens": 60}
    route = roles.route()
    if mode == "alone":
        mode, route = "", dataclasses.replace(route, prefill=())
    asked = [
        dataclasses.replace(
            request("eagle3", tree, n=n, seed=n, sampling=sampling, draft_prefill=mode), request_id=tree
        )
        for tree, n in (("chain(4)", 29), ("dynamic(3,3,6)", 1), ("static(3x2)", 50))
    ]
    answers = roles.ask(*asked, route=route)
    for one, answer in zip(asked, answers, strict=True):
        snapshots = found[one.request_id]
        assert len(snapshots) == answer.stats.verifications > VERIFICATIONS
        assert snapshots[0].tokens == [*one.prompt_ids, answer.tokens[0]]
        for snapshot in snapshots[: VERIFICATIONS + 1]:
            reference.check(snapshot)
    assert sum(answer.stats.accepted_tokens for answer in answers) > 0


def test_the_recompute_would_notice_a_row_shifted_by_one(roles, reference, monkeypatch):
    """The positive control of the test above."""
    found = watch(roles, monkeypatch)
    roles.ask(request("eagle3", "chain(3)", n=20, sampling={"max_tokens": 8}))
    ((snapshot, *_),) = found.values()
    reference.check(snapshot)
    row = len(snapshot.kv) // (len(snapshot.tokens) - 1)
    for broken in (
        dataclasses.replace(snapshot, kv=snapshot.kv[row:] + snapshot.kv[:row]),
        dataclasses.replace(snapshot, tokens=[*snapshot.tokens[:-1], (snapshot.tokens[-1] + 1) % 256]),
        dataclasses.replace(snapshot, logits=snapshot.logits.roll(1)),
    ):
        with pytest.raises(AssertionError):
            reference.check(broken)
