"""A draft model inside the engine: what it tells, other tokenizers and vocabularies, and the end of its context."""

from __future__ import annotations

import pytest

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator, new_context
from pdspec.engine.prefill import PrefillSequence
from pdspec.errors import ConfigError, Incompatible
from pdspec.model.tiny import byte_tokenizer
from pdspec.spec.draft_model.config import GROUP
from pdspec.spec.draft_model.drafter import BEYOND
from pdspec.types import DraftPrefill, GenerateRequest, SamplingParams
from tests.tiny_folder import save_tiny


def generator(where, **changes):
    return LocalGenerator(WorkerConfig(
        model="tiny", dtype="float32", drafters=("none", "draft_model"), drafter="draft_model", cache_tokens=2048,
        heads={"draft_model": where}, threads=1, chunk=16, **changes,
    ))


def answer(local, drafter, n=40, tokens=40, **sampling):
    params = SamplingParams(max_tokens=tokens, seed=2, ignore_eos=True, **sampling)
    ids = tuple((5 * i * i + 3) % 256 for i in range(n))
    asked = GenerateRequest(request_id="a", prompt_ids=ids, drafter=drafter, sampling=params, trace=True)
    chunks = list(local.generate(asked))
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].stats


class Told:
    """Prefill events as they come."""

    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        return lambda *values: self.events.append((name, *values))


@pytest.mark.parametrize("chunk", [7, 64])
def test_the_engine_tells_n_plus_1_rows_of_each_layer_and_the_last_after_t_n(chunk):
    local, told = generator("random:5"), Told()
    resources, n = local.resources, 20
    asked = GenerateRequest(request_id="a", prompt_ids=tuple(range(60, 60 + n)), sampling=SamplingParams(seed=1))
    ctx = new_context(resources, asked, resources.pool.allocate(8))
    prompt = PrefillSequence(request=asked, ctx=ctx, drafter=resources.drafter(""), events=told,
                             draft_prefill=DraftPrefill.PREFILL)
    while not prompt.finished:
        local.prefill.step([(prompt, min(chunk, prompt.remaining))])
    rows = [event for event in told.events if event[:2] == ("rows", GROUP)]
    assert {event[2] for event in rows} == {0}  # random:5 has one layer
    assert [row for event in rows for row in range(*event[3:])] == list(range(n + 1))
    kinds = [event[0] for event in told.events]
    assert kinds.index("first") < told.events.index(rows[-1]) < kinds.index("start") < kinds.index("done")
    assert "hidden" not in kinds
    resources.pool.release(ctx.pages)
    local.resources.close()


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(tmp_path):
    other = byte_tokenizer()
    vocabulary = other["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    with pytest.raises(Incompatible, match=r"heads\.draft_model: token 65 is 'A' in tiny and 'B' in") as refusal:
        generator(save_tiny(tmp_path, tokenizer=other))
    assert refusal.value.field == "heads.draft_model"
    shorter = byte_tokenizer()
    shorter["added_tokens"] = shorter["added_tokens"][:2]
    del shorter["model"]["vocab"]["<|pad|>"]
    with pytest.raises(Incompatible, match=r"token 258 is '<\|pad\|>' in tiny and absent in"):
        generator(save_tiny(tmp_path, tokenizer=shorter))


def test_without_a_name_there_is_no_draft_model():
    with pytest.raises(ConfigError, match=r"heads\.draft_model"):
        LocalGenerator(WorkerConfig(model="tiny", drafters=("none", "draft_model"), drafter="none"))


@pytest.mark.parametrize("vocab_size", [260, 300])
def test_vocabularies_may_be_padded_differently(tmp_path, vocab_size):
    """The target writes ids that the smaller draft model has no row for; both go on."""
    local = generator(save_tiny(tmp_path, vocab_size=vocab_size))
    bias = tuple((token, 30.0) for token in (*range(262, 272), 40))
    tokens, stats = answer(local, "draft_model", temperature=1.0, logit_bias=bias)
    assert max(tokens) >= 262 and tokens == answer(local, "none", temperature=1.0, logit_bias=bias)[0]
    tokens, stats = answer(local, "draft_model")
    assert stats.accepted_tokens > 0 and tokens == answer(local, "none")[0]
    local.resources.close()


@pytest.mark.parametrize(("n", "tokens"), [(40, 60), (62, 20), (63, 20), (64, 20), (65, 20), (120, 20)])
def test_beyond_its_context_it_drafts_nothing_and_says_so(tmp_path, n, tokens):
    local = generator(save_tiny(tmp_path, context=64))
    drafter, contexts = local.resources.drafters["draft_model"], {}
    real = drafter.propose

    def propose(batch, budgets):
        contexts.update({ctx.request_id: ctx for ctx in batch})
        drafts = real(batch, budgets)
        for ctx, draft in zip(batch, drafts, strict=True):
            if draft.num_nodes:  # as deep as positions 0..63 lead
                assert ctx.root_position + draft.num_nodes <= 64
            assert (draft.num_nodes == 0) == (ctx.root_position >= 64)
        return drafts

    drafter.propose = propose
    assert drafter.rows_at(n) == {GROUP: min(n + 1, 64)}
    out, stats = answer(local, "draft_model", n, tokens)
    assert out == answer(local, "none", n, tokens)[0] and stats.output_tokens == tokens
    assert contexts["a"].metrics[BEYOND] > 0
    assert (stats.drafted_tokens > 0) == (n < 64)
    local.resources.close()
