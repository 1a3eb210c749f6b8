"""The decode worker's MTP state against the report: after the handoff and after each of 20 verifications, the KV of
every module and the logits of the next draft token equal a recompute from the committed tokens alone, with the target's
hidden states by transformers. Both workers poison what they erase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pdspec.model.files import resolve
from pdspec.model.loader import load_weights
from pdspec.model.reference import reference_model
from pdspec.spec.mtp.checkpoint import random_head
from pdspec.spec.mtp.config import MtpConfig
from pdspec.study.mtp_reference import PaperMtp
from tests.parity.roles import Roles, request, running

VERIFICATIONS, BAR = 20, 1e-4
SEED = 7


class Reference:
    """The modules of ``random:SEED``, and the target, by other code."""

    def __init__(self, modules: int, *, shift: int = 0) -> None:
        files = resolve("tiny")
        weights = load_weights(files, "float32")
        head = random_head(MtpConfig.for_target(files.config, files.config.vocab_size // 2, modules), SEED)
        self.paper = PaperMtp(head, weights["model.embed_tokens.weight"], weights["lm_head.weight"], shift=shift)
        self.target = reference_model(files, "float32").double()

    @torch.inference_mode()
    def difference(self, snapshot: dict[str, Any]) -> float:
        tokens = list(snapshot["tokens"])
        final = self.target(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states[-1][0]
        apart = []
        for wanted, found in zip(self.paper.committed(tokens, final), snapshot["kv"], strict=True):
            got = torch.frombuffer(bytearray(found), dtype=torch.float32) if found else torch.empty(0)
            assert got.numel() == wanted.numel()
            apart += [(got.view(wanted.shape).double() - wanted).abs().max()] if found else []
        logits = self.paper.logits(tokens, final, ())
        if snapshot["logits"] is not None:
            apart.append((snapshot["logits"].double() - logits).abs().max())
        if snapshot["first"] is not None:
            chosen = logits[[self.paper.target_ids.tolist().index(token) for token in snapshot["first"]]]
            apart.append((chosen - logits.topk(len(chosen)).values).abs().max())
        largest = torch.stack(apart).max()
        return float("inf") if largest.isnan() else float(largest)


@contextmanager
def watching(roles: Roles) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """What each sequence had before its steps on the decode worker, by request id."""
    host, found = roles.decode.engine.host, dict[str, list[dict[str, Any]]]()
    real = host.decode.step

    def step(sequences):
        for sequence in sequences:
            ctx, drafter, cache = sequence.ctx, sequence.drafter, host.resources.cache
            rows, feature, first = drafter.rows_at(ctx.root_position), ctx.state.feature, ctx.state.candidates
            kv = [cache.read_rows(name, 0, list(ctx.pages), 0, count) for name, count in rows.items()]
            with torch.inference_mode():
                known = not feature[:, 0].isnan().any()  # of one module nothing but the first tokens is shipped
                logits = drafter.model.logits(feature)[0].clone() if known else None
            assert known or first is not None
            found.setdefault(ctx.request_id, []).append({
                "tokens": tuple(ctx.token_ids), "kv": kv, "logits": logits,
                "first": None if first is None else first.token_ids.tolist(),
            })  # fmt: skip
        return real(sequences)

    roles.decode.engine.post(lambda: setattr(host.decode, "step", step)).result()
    try:
        yield found
    finally:
        roles.decode.engine.post(lambda: delattr(host.decode, "step")).result()


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_every_module_s_kv_and_next_logits_equal_a_recompute_after_every_verification(modules):
    trees = ("chain({})", "dynamic({},3,6)", "static({})")
    changes = {"prefill": {"chunk": 7, "page_size": 4}, "decode": {"page_size": 16}, "drafters": ("none", "mtp")}
    common = {"heads": {"mtp": f"random:{SEED}"}, "options": {"mtp:modules": str(modules)}, "drafter": "mtp"}
    reference, unshifted = Reference(modules), Reference(modules, shift=1)
    with running(dtype="float32", **changes, **common) as roles:
        for mode in ("prefill", "decode", "alone"):
            asked = [
                dataclasses.replace(
                    request("mtp", tree.format("x".join("2" * modules) if "static" in tree else modules), n=n, seed=n,
                            sampling={"max_tokens": 30 + 21 * modules}, draft_prefill="" if mode == "alone" else mode),
                    request_id=f"{mode} {tree}",
                )
                for tree, n in zip(trees, (29, 1, 50), strict=True)
            ]
            route = roles.route() if mode != "alone" else dataclasses.replace(roles.route(), prefill=())
            with watching(roles) as found:
                answers = roles.ask(*asked, route=route)
            for one, answer in zip(asked, answers, strict=True):
                assert answer.stats.draft_rebuilds == 0
                snapshots = found[one.request_id][: VERIFICATIONS + 1]
                assert len(snapshots) == VERIFICATIONS + 1
                assert snapshots[0]["tokens"] == (*one.prompt_ids, answer.tokens[0])
                for snapshot in snapshots:
                    assert reference.difference(snapshot) <= BAR
                assert unshifted.difference(snapshots[0]) > BAR and unshifted.difference(snapshots[-1]) > BAR


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_one_module_reused_keeps_tokens_and_proposals(mode):
    changes = {"prefill": {"chunk": 7, "page_size": 8}, "decode": {"page_size": 16}, "drafters": ("none", "mtp")}
    common = {"heads": {"mtp": "random:0"}, "options": {"mtp:reuse": "true"}, "drafter": "mtp"}
    with running(dtype="bfloat16", **changes, **common) as roles:
        asked = [
            request("mtp", tree, n=3 + 20 * i, seed=i, sampling={"temperature": 0.4 * i}, draft_prefill=mode)
            for i, tree in enumerate(("chain(5)", "dynamic(4,3,8)", "static(2x2x1x1)"))
        ]
        for one, answer in zip(asked, roles.ask(*asked), strict=True):
            local = roles.ask_local(one)
            plain = roles.ask_local(dataclasses.replace(one, drafter="none", tree=""))
            assert answer.tokens == local.tokens == plain.tokens
            assert answer.traces == local.traces and answer.stats.draft_rebuilds == 0
