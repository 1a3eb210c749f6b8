"""The decode worker's MTP state against the report: after the handoff and after each of 20 verifications, the KV of
every module and the logits of the next draft token equal a recompute from the committed tokens alone, with the target's
hidden states by transformers. Both workers poison what they erase."""

from __future__ import annotations

import dataclasses

import pytest

from pdspec.config import WorkerConfig
from pdspec.study.handoff_state import BAR, VERIFICATIONS, Reference, watching
from tests.parity.roles import TINY, request, running


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_every_module_s_kv_and_next_logits_equal_a_recompute_after_every_verification(modules):
    trees = ("chain({})", "dynamic({},3,6)", "static({})")
    changes = {"prefill": {"chunk": 7, "page_size": 4}, "decode": {"page_size": 16}, "drafters": ("none", "mtp")}
    common = {"heads": {"mtp": "random:7"}, "options": {"mtp:modules": str(modules)}, "drafter": "mtp"}
    config = WorkerConfig(**{**TINY, **common, "drafters": ("none", "mtp"), "dtype": "float32"})
    reference, unshifted = Reference(config, "mtp"), Reference(config, "mtp")
    unshifted.paper.shift = 1  # type: ignore[union-attr]
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
            with watching(roles.decode, VERIFICATIONS + 1) as found:
                answers = roles.ask(*asked, route=route)
            for one, answer in zip(asked, answers, strict=True):
                assert answer.stats.draft_rebuilds == 0
                snapshots = found[one.request_id]
                assert len(snapshots) == VERIFICATIONS + 1
                assert snapshots[0].tokens == (*one.prompt_ids, answer.tokens[0])
                for snapshot in snapshots:
                    assert reference.compare(snapshot).largest <= BAR
                assert all(unshifted.compare(snapshots[i]).largest > BAR for i in (0, -1))


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
