"""The studies of steps: verifying path by path and advancing by the minimum write the tokens of the production step,
and the figures say what they cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from pdspec.cli import app
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError
from pdspec.spec.protocol import Draft
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.other_steps import Counting, PathByPath, Synchronised, leaf_paths
from pdspec.study.pair import Traced
from pdspec.study.steps import run
from pdspec.types import GenerateRequest, SamplingParams

WORKER = {"model": "tiny", "threads": 1, "cache_tokens": 8192, "poison": True}
FAMILIES = ("medusa", "mtp", "draft_model")
CASES = [("medusa", 0.0), *((name, 1.0) for name in FAMILIES)]


@pytest.fixture(scope="module")
def local() -> Iterator[LocalGenerator]:
    config, missing = with_random_heads(worker_config(WORKER, FAMILIES))
    assert missing == FAMILIES
    generator = LocalGenerator(config)
    yield generator
    generator.resources.pool.check_integrity([])
    generator.resources.close()


def ask(drafter: str, tree: str, temperature: float, count: int = 4) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            request_id=str(n), prompt_ids=tuple((5 * i * i + 3 * n) % 250 for i in range(20 + 7 * n)), drafter=drafter,
            tree=tree, trace=True,
            sampling=SamplingParams(max_tokens=20, ignore_eos=True, temperature=temperature, seed=n, logprobs=1),
        )
        for n in range(count)
    ]  # fmt: skip


def answers(local: LocalGenerator, engine: Counting, requests: list[GenerateRequest]) -> list[Traced]:
    local.decode = engine
    return Traced.batch(local.generate_batch(requests), len(requests))


@pytest.mark.parametrize(("drafter", "temperature"), CASES)
def test_path_by_path_is_the_tree_in_more_forwards(local, drafter, temperature):
    for tree, paths in (("static(2x2)", 4), ("dynamic(2,3,6)", None), ("chain(2)", 1)):
        requests = ask(drafter, tree, temperature)
        whole, single = Counting(local.resources), PathByPath(local.resources)
        assert answers(local, whole, requests) == answers(local, single, requests)  # tokens, drafts, accepted counts
        assert single.steps == whole.steps == whole.forwards
        if paths == 1:
            assert (single.forwards, single.bytes_read) == (whole.forwards, whole.bytes_read)
        else:
            assert single.forwards > 2 * whole.forwards and single.bytes_read > 2 * whole.bytes_read
            assert paths is None or single.forwards <= paths * whole.forwards


@pytest.mark.parametrize(("drafter", "temperature"), CASES)
def test_the_synchronised_minimum_writes_the_same_tokens_in_step(local, drafter, temperature):
    requests = ask(drafter, "chain(2)", temperature)
    free, bound = Counting(local.resources), Synchronised(local.resources)
    wanted, found = answers(local, free, requests), answers(local, bound, requests)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert len({tuple(trace.accepted for trace in one.traces) for one in found}) == 1  # all advance alike
    assert bound.steps >= free.steps and free.discarded == 0
    assert (bound.discarded > 0) == ([one.traces for one in found] != [one.traces for one in wanted])


def test_sequences_that_accept_different_counts_are_held_back(local):
    bound = Synchronised(local.resources)
    answers(local, bound, ask("draft_model", "chain(2)", 1.0))
    assert bound.discarded > 0


def test_paths_lead_from_the_root_to_each_leaf():
    def draft(*parents: int) -> Draft:
        count = len(parents)
        return Draft(token_ids=np.arange(count, dtype=np.int32), parents=np.array(parents, np.int32),
                     log_q=np.zeros(count, np.float32), survival=np.ones(count, np.float32))

    assert leaf_paths(draft()) == [[]]
    assert leaf_paths(draft(-1, 0, 1)) == [[0, 1, 2]]
    assert leaf_paths(draft(-1, -1, 0, 0, 1)) == [[0, 2], [0, 3], [1, 4]]


@pytest.mark.parametrize(
    ("study", "drafter", "labels"),
    [("medusa-paths", "medusa", ["one tree", "path by path"]),
     ("min-sync", "draft_model", ["continuous", "synchronised minimum"])],
)  # fmt: skip
def test_the_commands_print_one_table_each(study, drafter, labels, monkeypatch, capsys):
    argv = ["pdspec", "study", study, "--drafters", drafter, "--model", "tiny", "--num-prompts", "3", "--max-tokens",
            "12", "--threads", "1", "--temperatures", "1", "--sequences", "2", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        app.main()
    result = json.loads(capsys.readouterr().out)
    assert not ended.value.code and result["ok"] and result["random_heads"] == [drafter]
    assert [row["setting"] for row in result["rows"]] == labels
    production, other = result["rows"]
    for row in result["rows"]:
        assert row["same_answers"] and row["kv_bytes"] > 0 and row["step_ms"] > 0 and row["tokens_per_second"] > 0
        assert row["acceptance_length"] == row["local_acceptance_length"] >= 1
    assert production["forwards_per_step"] == 1 and other["bytes_read"] >= production["bytes_read"]
    if study == "medusa-paths":
        assert other["forwards_per_step"] > 2 and other["acceptance_length"] == production["acceptance_length"]


def test_what_the_studies_say_nothing_about_is_refused():
    asked = {"worker": WORKER, "tree": "", "temperatures": [0.0], "sequences": 2, "prompts": None, "num_prompts": 2,
             "max_tokens": 8, "progress": print}  # fmt: skip
    for study, drafter in (("min-sync", "suffix"), ("min-sync", "none"), ("medusa-paths", "lookahead")):
        with pytest.raises(ConfigError, match=f"says nothing about {drafter}"):
            run(study, drafters=[drafter], **asked)
    with pytest.raises(ConfigError, match="need no verification"):
        run("min-sync", drafters=["ngram"], **{**asked, "max_tokens": 1})
