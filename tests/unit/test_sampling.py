import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdspec import noise
from pdspec.errors import InvalidRequest, PdspecError
from pdspec.sampling import History, _best, choose, draft_scores, gumbel_noise, pick, support, token_logprob
from pdspec.types import SamplingParams

NONE = History.of((0,))
ONES = 0xFFFFFFFF


def dense(logits, *, history=NONE, end_ids=(), **params):
    """log p over the whole vocabulary."""
    row = torch.tensor(logits, dtype=torch.float32)
    return support(row, SamplingParams(**params), history, end_ids=end_ids).dense(len(row))


def kept(logits, **params):
    return np.flatnonzero(dense(logits, **params) > -np.inf).tolist()


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(("counter", "key", "words"), [  # Random123 1.14.0, kat_vectors, "philox4x32 10"
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_known_answers(counter, key, words):
    assert noise.philox4x32(counter, key) == words


@pytest.mark.parametrize(("seed", "sample", "position", "words"), [
    (0, 0, 0, [3697691182, 1201009183, 196094153, 3954516304, 3261050477]),
    (0x0123456789ABCDEF, 3, 40_000, [2984830170, 1356759125, 2728883662, 4108981160, 26202213]),
])
def test_integer_noise_vectors(seed, sample, position, words):
    ids = np.array([0, 1, 2, 49_151, 151_935])
    assert noise.token_words(seed, sample, position, ids).tolist() == words


@pytest.mark.parametrize("word", [0, 1, 255, 2**24 + 1, 2**31, ONES - 2**20, ONES - 1, ONES])
def test_noise_is_finite_and_precise_at_both_ends(word):
    (g,) = noise._gumbel(np.array([word], np.uint32))
    exact = -math.log(-math.log1p(-(word + 0.5) * 2.0**-32))
    assert math.isfinite(g)
    assert g == pytest.approx(exact, abs=3e-6 if exact > -2 else 0.4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(0, 2**33), st.integers(1, 3000), st.data())
def test_noise_at_some_ids_is_the_full_vector_gathered(seed, sample, position, vocab_size, data):
    full = gumbel_noise(seed, sample, position, vocab_size=vocab_size)
    assert full.dtype == torch.float32 and full.shape == (vocab_size,)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=80)), dtype=torch.int64)
    assert torch.equal(gumbel_noise(seed, sample, position, token_ids=ids), full[ids])


def test_noise_differs_by_seed_sample_and_position():
    keys = [(1, 0, 5), (2, 0, 5), (1 + 2**32, 0, 5), (1, 1, 5), (1, 0, 6), (1, 0, 5 + 2**32)]
    vectors = [gumbel_noise(*key, vocab_size=64) for key in keys]
    for i, first in enumerate(vectors):
        assert torch.equal(first, gumbel_noise(*keys[i], vocab_size=64))
        assert all((first != other).sum() > 60 for other in vectors[i + 1 :])


def test_noise_takes_one_of_ids_and_size():
    with pytest.raises(ValueError, match="either"):
        gumbel_noise(1, 0, 0)
    with pytest.raises(ValueError, match="either"):
        gumbel_noise(1, 0, 0, token_ids=torch.tensor([1]), vocab_size=4)


def test_sampled_frequencies_follow_p():
    p = np.array([0.02, 0.4, 0.08, 0.2, 0.3])
    logits = torch.tensor(np.log(p), dtype=torch.float32)
    params, draws = SamplingParams(temperature=1.0), 4000
    for key in ("seed", "sample", "position"):
        counts = np.zeros(5)
        for i in range(draws):
            where = {"seed": 7, "sample": 0, "position": 3, key: i}
            counts[choose(logits, params, NONE, end_ids=(), **where)] += 1
        chi_square = ((counts - draws * p) ** 2 / (draws * p)).sum()
        assert chi_square < 18.47, key  # 4 degrees of freedom, P = 0.001


def test_noise_at_neighbouring_positions_is_independent():
    draws = np.stack([noise.gumbel_all(11, 0, position, 512) for position in range(200)])
    pairs = np.corrcoef(draws[:, :40].T) - np.eye(40)
    assert abs(pairs).max() < 5 / math.sqrt(200)
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.02
    assert draws.mean() == pytest.approx(0.5772, abs=0.02)
    assert draws.var() == pytest.approx(math.pi**2 / 6, abs=0.05)


# ---------------------------------------------------------------- processors


def test_greedy_takes_the_lowest_of_equals():
    row = torch.zeros(49_152)
    row[[700, 40_000]] = 2.5
    assert choose(row, SamplingParams(), NONE, seed=1, sample=0, position=4, end_ids=()) == 700


def test_penalties_count_prompt_and_output_as_documented():
    history = History.of((1, 2, 2)).extended((3, 3, 2))
    logits = [1.0, 2.0, -2.0, 4.0]
    raw = support(
        torch.tensor(logits),
        SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25), history, end_ids=(),
    ).scores
    assert raw.tolist() == [1.0, 1.0, -4.0 - 0.5 - 0.25, 2.0 - 1.0 - 0.25]


def test_input_logits_are_never_written():
    row = torch.tensor([1.0, 2.0, 3.0])
    for params in (SamplingParams(banned_ids=(2,)), SamplingParams(temperature=0.5, top_p=0.4), SamplingParams()):
        choose(row, params, NONE, seed=1, sample=0, position=1, end_ids=())
    assert row.tolist() == [1.0, 2.0, 3.0]


def test_bias_comes_before_bans_and_temperature():
    log_p = dense([0.0, 0.0, 0.0], logit_bias=((0, 1.0), (2, 50.0)), banned_ids=(2,), temperature=0.5)
    assert log_p[2] == -np.inf
    assert log_p[0] - log_p[1] == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_allowed_banned_and_early_ends(temperature):
    logits = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert kept(logits, temperature=temperature, allowed_ids=(1, 3), banned_ids=(3,)) == [1]
    early = {"temperature": temperature, "min_tokens": 2, "end_ids": (4,), "stop_ids": (0,)}
    assert kept(logits, **early, history=NONE.extended((1,))) == [1, 2, 3]
    assert kept(logits, **early, history=NONE.extended((1,)), ignore_eos=True) == [1, 2, 3, 4]
    assert kept(logits, **early, history=NONE.extended((1, 1))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("params", "ids"), [
    ({"top_k": 2}, [0, 3]),  # 0 and 1 tie: the lower id stays
    ({"top_k": 3}, [0, 1, 3]),
    ({"top_p": 0.5}, [3]),
    ({"top_p": 0.51}, [0, 3]),
    ({"top_p": 1e-9}, [3]),
    ({"min_p": 0.5}, [0, 1, 3]),
    ({"min_p": 0.51}, [3]),
    ({"top_k": 3, "top_p": 0.74}, [0, 3]),  # of what top-k left: 1/2, 1/4, 1/4
    ({"top_k": 3, "top_p": 0.76}, [0, 1, 3]),
])
def test_truncation(params, ids):
    p = [0.25, 0.25, 0.0, 0.5]
    assert kept([math.log(x) if x else -50.0 for x in p], temperature=1.0, **params) == ids


def test_truncated_p_is_renormalised():
    log_p = dense([math.log(x) for x in (0.1, 0.2, 0.3, 0.4)], temperature=1.0, top_k=2)
    assert np.exp(log_p) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 4.0), st.floats(0.05, 0.999), st.integers(300, 5000))
def test_top_p_prefilter_equals_a_full_sort(seed, spread, top_p, vocab_size):
    row = np.random.default_rng(seed).normal(0, spread, vocab_size).astype(np.float32)
    row[: vocab_size // 3] = np.round(row[: vocab_size // 3])  # ties
    x = row - row.max()
    order = np.argsort(-x, kind="stable")
    mass = np.exp(x[order]).cumsum(dtype=np.float64)
    expected = order[: int((mass < top_p * np.exp(x).sum(dtype=np.float64)).sum()) + 1]
    assert kept(row, temperature=1.0, top_p=top_p) == sorted(expected.tolist())


def test_ranking_is_a_stable_descending_sort():
    x = np.random.default_rng(3).normal(0, 3, 4000).round(1).astype(np.float32)
    x[:6] = [0.0, -0.0, 0.0, -np.inf, np.float32(1e38), -1e-45]
    for count in (0, 1, 7, 300, 3999, 4000, 5000):
        assert _best(x, count).tolist() == np.argsort(-x, kind="stable")[:count].tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_stay_defined(temperature):
    row = torch.tensor([30.0, -40.0, 29.0])
    chosen = choose(row, SamplingParams(temperature=temperature), NONE, seed=5, sample=0, position=9, end_ids=())
    assert chosen == 0 if temperature < 1 else chosen in (0, 1, 2)


def test_everything_excluded_is_refused_with_a_remedy():
    with pytest.raises(InvalidRequest, match=r"allowed_ids.*every token is excluded"):
        dense([1.0, 2.0], allowed_ids=(1,), banned_ids=(1,))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_scores_are_never_sampled_from(value, temperature):
    with pytest.raises(PdspecError, match="damaged"):
        dense([0.0, value, 9.0, 1.0], temperature=temperature)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63), st.sampled_from([{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"banned_ids": (3, 4)}]))
def test_sparse_choice_equals_the_dense_definition(seed, truncation):
    row = torch.tensor(np.random.default_rng(seed).normal(0, 2, 300), dtype=torch.float32)
    params = SamplingParams(temperature=0.8, **truncation)
    chosen = choose(row, params, NONE, seed=seed, sample=1, position=17, end_ids=())
    scores = dense(row.tolist(), temperature=0.8, **truncation) + gumbel_noise(seed, 1, 17, vocab_size=300).numpy()
    assert scores[chosen] >= scores.max() - 1e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63), st.sampled_from([0.5, 4.0, 12.0]))
def test_leaving_out_the_hopeless_changes_no_choice(seed, spread):
    row = torch.tensor(np.random.default_rng(seed).normal(0, spread, 2000), dtype=torch.float32)
    params = SamplingParams(temperature=0.8)
    for position in range(8):
        scores = support(row, params, NONE, end_ids=()).scores + noise.gumbel_all(seed, 0, position, 2000)
        assert choose(row, params, NONE, seed=seed, sample=0, position=position, end_ids=()) == scores.argmax()


def test_no_noise_is_above_the_bound():
    assert noise._gumbel(np.array([0], np.uint32))[0] <= noise.LARGEST


@given(st.lists(st.integers(0, 20), max_size=150), st.integers(1, 7))
def test_history_counts_however_it_grew(tokens, stride):
    history = History.of((5, 6, 5))
    for i in range(0, len(tokens), stride):
        history = history.extended(tokens[i : i + stride])
    ids, counts = history.output_counts()
    expected = np.unique(tokens, return_counts=True)
    assert ids.tolist() == expected[0].tolist() and counts.tolist() == expected[1].tolist()
    assert (history.num_output, history.prompt_ids.tolist()) == (len(tokens), [5, 6])


def test_extending_a_history_leaves_it_alone():
    before = History.of((1,), range(40))
    left, right = before.extended((1,)), before.extended((2, 2))
    assert (before.num_output, left.num_output, right.num_output) == (40, 41, 42)
    assert dict(zip(*right.output_counts(), strict=True))[2] == 3
    assert dict(zip(*left.output_counts(), strict=True))[2] == 1


# ---------------------------------------------------------------- log probabilities and drafts


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_logprobs_after_processors(params):
    row = torch.tensor([math.log(x) for x in (0.1, 0.2, 0.2, 0.5)])
    allowed = support(row, SamplingParams(**params), NONE, end_ids=())
    report = token_logprob(allowed, 2, 3)
    scale = 0.9 if "top_k" in params else 1.0
    assert report.token_id == 2
    assert report.logprob == pytest.approx(math.log(0.2 / scale), abs=1e-6)
    assert [token for token, _ in report.top] == [3, 1, 2]
    assert report.top[0][1] == pytest.approx(math.log(0.5 / scale), abs=1e-6)
    if "top_k" in params:
        assert token_logprob(allowed, 0, 9).logprob == -np.inf
        assert len(token_logprob(allowed, 0, 9).top) == 3


def test_greedy_choice_is_the_same_with_and_without_normalising():
    row = torch.full((1000,), 20.0)
    row[500] = float(np.nextafter(np.float32(20.0), np.float32(21.0)))  # lost to rounding in log p
    allowed = support(row, SamplingParams(), NONE, end_ids=())
    assert pick(allowed, SamplingParams(), lambda ids: noise.gumbel(0, 0, 0, ids)) == 500


def test_draft_scores():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    noise_3 = torch.tensor([0.5, -1.0, 2.0])
    log_q, s = draft_scores(logits, 0.5, noise_3)
    assert torch.allclose(log_q, torch.log_softmax(logits * 2, -1), atol=1e-6)
    assert torch.equal(s, log_q + noise_3)
    greedy_q, greedy_s = draft_scores(logits, 0.0, None)
    assert torch.equal(greedy_s, greedy_q) and torch.equal(greedy_q, torch.log_softmax(logits, -1))
    assert torch.allclose(draft_scores(log_q, 1.0, noise_3)[0], log_q, atol=1e-6)
    alone, unmoved = draft_scores(logits, 0.5, None)
    assert torch.equal(alone, log_q) and torch.equal(unmoved, log_q)
