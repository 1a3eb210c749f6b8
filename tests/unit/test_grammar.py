"""Grammars: states are values, masks are what JSON Schema says, and what cannot be is refused with its field."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pdspec.errors import InvalidRequest
from pdspec.grammar import Grammars, check_structure
from pdspec.model.tokenizer import load_tokenizer
from pdspec.sampling import History, support
from pdspec.types import SamplingParams

TOKENIZER = load_tokenizer("tiny")
SIZE = 300  # the model has rows that are no tokens
END = TOKENIZER.eos_ids[0]
SCHEMA = json.dumps({
    "type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"],
    "additionalProperties": False,
})  # fmt: skip


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER.to_json, vocab_size=SIZE, end_ids=TOKENIZER.eos_ids)


def text_after(grammar, text):
    return grammar.extended(TOKENIZER.encode(text))


def texts(grammar):
    ids = np.flatnonzero(grammar.allowed(SIZE)).tolist()
    return {TOKENIZER.token_bytes(one).decode() for one in ids if one not in TOKENIZER.eos_ids}, END in ids


def test_a_state_is_a_value(grammars):
    first = grammars.start(SamplingParams(choice=("yes", "yep", "no")))
    assert texts(first) == ({"y", "n"}, False)
    ye = text_after(first, "ye")
    one, other = text_after(ye, "s"), text_after(ye, "p")  # two children of one node
    assert texts(ye) == ({"s", "p"}, False) and texts(one) == texts(other) == (set(), True)
    assert texts(first) == ({"y", "n"}, False)
    replayed = grammars.start(SamplingParams(choice=("yes", "yep", "no")))
    assert texts(text_after(replayed, "ye")) == texts(ye)


def test_a_path_that_leaves_the_grammar_is_over_and_end_tokens_end_it(grammars):
    first = grammars.start(SamplingParams(regex="ab+"))
    assert text_after(first, "ax").over and text_after(first, "ax").allowed(SIZE) is None
    done = text_after(first, "ab")
    assert texts(done) == ({"b"}, True) and not done.over
    assert done.extended([END]).over and done.extended([END, 5]).allowed(SIZE) is None


def test_json_on_one_line(grammars):
    first = grammars.start(SamplingParams(json_schema=SCHEMA))
    assert texts(first) == ({"{"}, False)
    assert texts(text_after(first, '{"a": [1')) == ({*"0123456789", ",", "]"}, False)
    assert texts(text_after(first, '{"a": [1]}')) == (set(), True)
    assert text_after(first, '{"a":[1]}').over and text_after(first, '{ "a": [1]}').over
    loose = json.dumps({**json.loads(SCHEMA), "x-guidance": {"whitespace_flexible": True}})
    assert not text_after(grammars.start(SamplingParams(json_schema=loose)), '{\n  "a" : [1]}').over


def test_recursive_schemas(grammars):
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}},
                                                   "additionalProperties": False}}}  # fmt: skip
    first = grammars.start(SamplingParams(json_schema=json.dumps(schema)))
    assert texts(text_after(first, '{"n": {"n": {}}}')) == (set(), True)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(json_schema="{"), "sampling.json_schema"),
        (SamplingParams(json_schema="[1]"), "sampling.json_schema"),
        (SamplingParams(json_schema="[" * 50_000), "sampling.json_schema"),
        (SamplingParams(json_schema='{"type": "nonsense"}'), "sampling.json_schema"),
        (SamplingParams(json_schema='{"not": {"type": "string"}}'), "sampling.json_schema"),
        (SamplingParams(json_schema='{"$ref": "http://example.org/schema"}'), "sampling.json_schema"),
        (SamplingParams(regex="("), "sampling.regex"),
        (SamplingParams(regex="(?=x)a"), "sampling.regex"),
    ],
)
def test_what_cannot_be_is_refused_on_both_sides(grammars, params, field):
    for check in (check_structure, grammars.start):
        with pytest.raises(InvalidRequest) as caught:
            check(params)
        assert caught.value.field == field and caught.value.remedy


def test_replayed_tokens_must_follow_it(grammars):
    params = SamplingParams(choice=("yes", "no"))
    grammars.check(params, TOKENIZER.encode("ye"))
    with pytest.raises(InvalidRequest, match="resume_ids"):
        grammars.check(params, TOKENIZER.encode("yo"))


def test_sampling_excludes_what_it_does_not_allow(grammars):
    """Whatever the scores: greedy and sampled, with penalties beside, and rows that are no tokens are never chosen."""
    logits = torch.zeros(SIZE + 20)
    logits[ord("x")] = logits[SIZE + 5] = 50.0
    asked = SamplingParams(choice=("yes", "no"))
    for params in (asked, replace(asked, temperature=2.0, top_p=0.9)):
        history = History.of((1, 2), TOKENIZER.encode("y"), grammar=grammars.start(params))
        found = support(logits, params, history, end_ids=TOKENIZER.eos_ids)
        finite = np.flatnonzero(np.isfinite(found.dense(SIZE + 20))).tolist()
        assert finite == TOKENIZER.encode("e")
        after = support(logits, params, history.extended(TOKENIZER.encode("es")), end_ids=TOKENIZER.eos_ids)
        assert set(np.flatnonzero(np.isfinite(after.dense(SIZE + 20))).tolist()) == set(TOKENIZER.eos_ids)
    early = SamplingParams(choice=("no",), min_tokens=5)
    history = History.of((1,), TOKENIZER.encode("no"), grammar=grammars.start(early))
    with pytest.raises(InvalidRequest, match="every token is excluded"):
        support(logits, early, history, end_ids=TOKENIZER.eos_ids)
