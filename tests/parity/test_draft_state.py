"""The decode worker's draft state against the paper: after the handoff and after each of 20 verifications, its draft KV
and the logits of its next draft token equal a recompute from the committed tokens alone
(``pdspec/study/handoff_state.py``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from pdspec.config import WorkerConfig
from pdspec.study.handoff_state import BAR, VERIFICATIONS, Difference, Reference, draft_state, verdict, watching
from tests.parity.roles import TINY, Roles, request, running

DRAFTERS = ("eagle1", "eagle3")
WORKER = {**TINY, "drafters": DRAFTERS, "heads": {"eagle1": "random:2", "eagle3": "random:0"}}


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return {drafter: Reference(WorkerConfig(**WORKER), drafter) for drafter in DRAFTERS}


@pytest.fixture
def reference(references) -> Reference:
    return references["eagle3"]


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    changes = {"prefill": {"chunk": 7, "page_size": 4}, "decode": {"page_size": 16}}
    with running(**{**WORKER, "dtype": "float32"}, **changes) as roles:
        yield roles


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("mode", ["prefill", "decode", "alone"])
def test_draft_kv_and_next_logits_equal_a_recompute_after_every_verification(roles, references, mode, drafter):
    sampling = {"max_tokens": 60}
    route = roles.route()
    if mode == "alone":
        mode, route = "", dataclasses.replace(route, prefill=())
    asked = [
        dataclasses.replace(
            request(drafter, tree, n=n, seed=n, sampling=sampling, draft_prefill=mode), request_id=tree
        )
        for tree, n in (("chain(4)", 29), ("dynamic(3,3,6)", 1), ("static(3x2)", 50))
    ]
    with watching(roles.decode, VERIFICATIONS + 1) as found:
        answers = roles.ask(*asked, route=route)
    for one, answer in zip(asked, answers, strict=True):
        snapshots = found[one.request_id]
        assert len(snapshots) == VERIFICATIONS + 1 <= answer.stats.verifications
        assert snapshots[0].tokens == (*one.prompt_ids, answer.tokens[0])
        for snapshot in snapshots:
            assert references[drafter].compare(snapshot).largest <= BAR
    assert sum(answer.stats.accepted_tokens for answer in answers) > 0


def test_the_recompute_would_notice_a_row_shifted_by_one(roles, reference):
    """The positive control of the test above."""
    with watching(roles.decode, 1) as found:
        roles.ask(request("eagle3", "chain(3)", n=20, sampling={"max_tokens": 8}))
    ((snapshot,),) = found.values()
    assert reference.compare(snapshot).largest <= BAR
    (kv,) = snapshot.kv
    row = len(kv) // (len(snapshot.tokens) - 1)
    ids = snapshot.first_ids
    for broken in (
        dataclasses.replace(snapshot, kv=(kv[row:] + kv[:row],)),
        dataclasses.replace(snapshot, kv=(b"\xff" * len(kv),)),  # NaN
        dataclasses.replace(snapshot, tokens=(*snapshot.tokens[:-1], (snapshot.tokens[-1] + 1) % 256)),
        dataclasses.replace(snapshot, logits=snapshot.logits.roll(1)),
        dataclasses.replace(snapshot, first_ids=(ids[1], ids[0], *ids[2:])),
    ):
        assert not reference.compare(broken).largest <= BAR
    with pytest.raises(ValueError, match="are due"):
        reference.compare(dataclasses.replace(snapshot, kv=(kv[row:],)))


def test_the_part_of_the_command_and_what_fails_it():
    config = WorkerConfig(**{**TINY, "dtype": "float32"})
    result = draft_state(config, [request(n=12, seed=12)], lambda text: None)
    assert result["ok"] and result["answers"] == 4 and result["states"] == 4 * (VERIFICATIONS + 1)
    assert 0 < result["largest_difference"] <= BAR
    good = Difference(kv=0.0, logits=0.0, first=0.0)
    assert not verdict([good], {}, 1)["ok"]  # an answer was not seen
    assert not verdict([good], {"a": []}, 1)["ok"]  # too few verifications
