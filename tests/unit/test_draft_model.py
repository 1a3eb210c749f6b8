"""The draft model against a dense float64 recompute: KV and logits after the prefill and after verifications, what is
kept and what is computed anew, its trees, its vocabulary and its end of context."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from dense_llama import DenseLlama, child_scores, paths

from pdspec.cache.paged import PagedCache
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator, new_context
from pdspec.engine.prefill import PrefillSequence
from pdspec.errors import ConfigError, Incompatible, TransferDamaged
from pdspec.model.files import ModelFiles
from pdspec.model.loader import load_weights
from pdspec.model.native import NativeOps
from pdspec.model.ops import TorchOps
from pdspec.model.runner import Runner
from pdspec.model.tiny import byte_tokenizer, tiny_config
from pdspec.sampling import History
from pdspec.spec.chooser import Seeded
from pdspec.spec.draft_model.config import GROUP
from pdspec.spec.draft_model.drafter import BEYOND, ModelDrafter
from pdspec.spec.protocol import DraftContext, HiddenRows, Verdict
from pdspec.spec.verify import verify
from pdspec.types import DraftPrefill, GenerateRequest, SamplingParams
from tests.tiny_folder import save_tiny

CONFIG = tiny_config("tiny-3")
FILES = ModelFiles(name="tiny-3", path=None, config=CONFIG, content_hash="c3", tokenizer_hash="t")
DENSE = DenseLlama(CONFIG, load_weights(FILES, "float32"))
NUM_PAGES, ROWS = 256, 160  # of a world; of a story


@pytest.fixture(scope="module")
def native():
    torch.set_num_threads(1)
    ops = NativeOps(2)
    yield ops
    ops.close()


@pytest.fixture(params=["native", "torch"])
def ops(request, native):
    return native if request.param == "native" else TorchOps(torch.device("cpu"))


@dataclass
class World:
    """A drafter with pages of its own, full of NaN: what is read was written."""

    drafter: ModelDrafter
    cache: PagedCache
    taken: int = 0
    computed: list[int] = field(default_factory=list)  # rows of each forward


def make_world(ops, *, page_size=8, **changes):
    runner = Runner(CONFIG, load_weights(FILES, "float32"), ops=ops, dtype="float32", group=GROUP)
    cache = PagedCache((CONFIG.cache_group(GROUP, "float32"),), NUM_PAGES, page_size)
    cache.poison(None, list(range(NUM_PAGES)), 0, NUM_PAGES * page_size)
    settings = {"vocab_size": CONFIG.vocab_size, "content_hash": "c3", "tree": "dynamic(3,3,6)", **changes}
    world = World(ModelDrafter(runner, cache, **settings), cache)
    real = runner.forward

    def counted(batch, *rest):
        world.computed.append(batch.num_rows)
        return real(batch, *rest)

    runner.forward = counted
    return world


class Story:
    """One sequence: random tokens and random acceptance, the same for the same seed."""

    def __init__(self, world, seed, length, *, temperature=0.0, tree="", **sampling):
        self.world, self.random = world, np.random.default_rng(seed)
        count = ROWS // world.cache.page_size
        pages = np.random.default_rng(seed).permutation(np.arange(world.taken, world.taken + count))
        world.taken += count
        self.ctx = DraftContext(
            request_id=f"story-{seed}", sampling=SamplingParams(temperature=temperature, **sampling),
            noise_key=(seed, 0), token_ids=self.tokens(length), pages=pages.tolist(), prompt_len=length, tree=tree,
        )

    def tokens(self, count):
        return self.random.integers(0, CONFIG.vocab_size, count).tolist()

    def prefill(self, cuts=(), *, early_last=False):
        length = self.ctx.prompt_len
        for a, b in pairwise([0, *cuts, length]):
            if b == length and not early_last:
                self.ctx.token_ids += self.tokens(1)
            self.world.drafter.prefill(self.ctx, HiddenRows(start=a, captured=None, final=None, count=b - a))
        if early_last:
            self.ctx.token_ids += self.tokens(1)
            self.world.drafter.prefill(self.ctx, HiddenRows(start=length, captured=None, final=None))
        return self

    def verdict(self, draft, node=None):
        """The path down to ``node`` (None: a random one, or none) is accepted, a random token follows."""
        node = int(self.random.integers(-1, draft.num_nodes)) if node is None else node
        path = []
        while node >= 0:
            path.insert(0, node)
            node = int(draft.parents[node])
        outputs = [int(draft.token_ids[node]) for node in path] + self.tokens(1)
        self.ctx.token_ids += outputs
        return self.ctx, Verdict(path=tuple(path), output_ids=tuple(outputs)), HiddenRows(
            start=self.ctx.root_position - len(outputs), captured=None, final=None, count=len(outputs)
        )

    def kv_rows(self):
        """All rows up to the root's: [layers, n+1, 2, kv heads, D]."""
        count = self.ctx.root_position + 1
        layers = [self.world.cache.read_rows(GROUP, layer, self.ctx.pages, 0, count) for layer in range(4)]
        rows = torch.stack([torch.frombuffer(bytearray(layer), dtype=torch.float32) for layer in layers])
        return rows.view(4, count, 2, CONFIG.num_kv_heads, CONFIG.head_dim)

    def poison_scratch(self):
        self.world.cache.poison(GROUP, self.ctx.pages, self.ctx.root_position + 1, ROWS)


def assert_as_recomputed(story):
    """Row i reads t_i at position i, the root's included; its logits are those of the dense model."""
    kv, logits = DENSE(story.ctx.token_ids)
    assert story.ctx.state.rows == len(story.ctx.token_ids) == kv.shape[1]
    torch.testing.assert_close(story.kv_rows().double(), kv, atol=1e-4, rtol=0)
    torch.testing.assert_close(story.ctx.state.logits[0].double(), logits[-1], atol=1e-3, rtol=0)


def same_drafts(a, b):
    names = ("token_ids", "parents", "log_q", "survival")
    return all(np.array_equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in names)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_after_the_prefill_and_each_of_20_verifications_state_equals_a_recompute(ops, temperature):
    """Rows behind the root are NaN before every proposal: none is read before it is written."""
    world = make_world(ops)
    cases = ((1, 1, ""), (2, 13, "chain(4)"), (3, 24, "static(2x2x1)"))
    stories = [Story(world, seed, n, temperature=temperature, tree=tree) for seed, n, tree in cases]
    for story in stories:
        assert_as_recomputed(story.prefill())
        world.drafter.start(story.ctx)
    accepted = set()
    for _ in range(20):
        for story in stories:
            story.poison_scratch()
        drafts = world.drafter.propose([story.ctx for story in stories], [6, 6, 6])
        news = [story.verdict(draft) for story, draft in zip(stories, drafts, strict=True)]
        accepted |= {verdict.num_accepted for _, verdict, _ in news}
        world.drafter.observe(news)
        for story in stories:
            assert_as_recomputed(story)
    assert accepted == {0, 1, 2, 3, 4}


def test_only_what_is_missing_is_computed(native):
    """The new root's row, and the deepest node's, which was never expanded."""
    world = make_world(native)
    story = Story(world, 4, 10, tree="chain(3)").prefill()
    for accepted, due in ((0, 1), (1, 1), (2, 1), (3, 2)):
        (draft,) = world.drafter.propose([story.ctx], [3])
        assert world.computed[-2:] == [1, 1]  # two levels are expanded
        news = story.verdict(draft, accepted - 1)
        del world.computed[:]
        world.drafter.observe([news])
        assert world.computed == [due]
        assert_as_recomputed(story)


def test_tokens_that_another_drafter_proposed_are_computed(native):
    world = make_world(native)
    story = Story(world, 4, 10, tree="chain(3)").prefill()
    (draft,) = world.drafter.propose([story.ctx], [3])
    story.ctx.token_ids += [5, 6, int(draft.token_ids[2]), 7]
    hidden = HiddenRows(start=10, captured=None, final=None, count=4)
    world.drafter.observe([(story.ctx, Verdict(path=(0, 1, 2), output_ids=(5, 6, 7, 7)), hidden)])
    assert_as_recomputed(story)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_chain_is_the_coupled_best_at_every_depth(ops, temperature):
    story = Story(make_world(ops), 6, 7, temperature=temperature, tree="chain(5)").prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [5])
    assert draft.parents.tolist() == [-1, 0, 1, 2, 3]
    tokens = list(story.ctx.token_ids)
    for depth, (token, log_q) in enumerate(zip(draft.token_ids.tolist(), draft.log_q.tolist(), strict=True), 1):
        logits = DENSE(tokens)[1][-1]
        assert token == int(child_scores(logits, story.ctx, depth).argmax())
        assert log_q == pytest.approx(float((logits / (temperature or 1)).log_softmax(-1)[token]), abs=1e-3)
        tokens.append(token)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(3, 3, 6), (2, 5, 12)])
def test_a_dynamic_tree_has_the_best_nodes_of_the_whole_search(ops, temperature, shape):
    depth, top_k, nodes = shape
    tree = f"dynamic({depth},{top_k},{nodes})"
    story = Story(make_world(ops), 5, 9, temperature=temperature, tree=tree).prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [64])
    scores, frontier = {}, [()]
    for level in range(depth):
        children = {}
        for path in frontier:
            best = child_scores(DENSE([*story.ctx.token_ids, *path])[1][-1], story.ctx, level + 1).topk(top_k)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                children[(*path, token)] = value + scores.get(path, 0.0)
        scores |= children
        frontier = sorted(children, key=lambda path: -children[path])[:top_k]
    assert set(paths(draft)) == set(sorted(scores, key=lambda path: -scores[path])[:nodes])


@pytest.mark.parametrize("cuts", [(1,), (8,), (3, 4, 19), tuple(range(1, 20))])
@pytest.mark.parametrize("early_last", [False, True])
def test_chunked_prefill_is_unchunked_prefill_to_the_bit(native, cuts, early_last):
    whole, cut = (Story(make_world(native), 9, 20) for _ in range(2))
    whole.prefill()
    cut.prefill(cuts, early_last=early_last)
    assert cut.ctx.token_ids == whole.ctx.token_ids
    assert torch.equal(cut.kv_rows(), whole.kv_rows())
    assert torch.equal(cut.ctx.state.logits, whole.ctx.state.logits)


def test_each_chunk_makes_the_rows_that_the_index_table_promises(native):
    """Rows [a, b) and the row of the token behind them, which is prompt, or t_n at the end: n+1 rows."""
    world = make_world(native)
    story = Story(world, 9, 20)
    for a, b in ((0, 7), (7, 16), (16, 20)):
        if b == 20:
            story.ctx.token_ids += story.tokens(1)
        world.drafter.prefill(story.ctx, HiddenRows(start=a, captured=None, final=None, count=b - a))
        assert story.ctx.state.rows == b + 1 == world.drafter.rows_at(b)[GROUP]
        assert (story.ctx.state.logits is None) == (b < 20)
    with pytest.raises(ValueError, match="draft rows are made"):
        world.drafter.prefill(story.ctx, HiddenRows(start=9, captured=None, final=None, count=2))


def test_long_prompts_take_several_forwards(native, monkeypatch):
    monkeypatch.setattr("pdspec.spec.draft_model.drafter.CHUNK", 8)
    story = Story(make_world(native), 9, 21).prefill()
    assert story.world.computed == [8, 8, 6]
    assert_as_recomputed(story)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_is_each_sequence_alone_to_the_bit(native, temperature):
    together, alone = make_world(native), make_world(native)
    cases = ((1, 1, "chain(3)"), (2, 13, "dynamic(3,3,6)"), (3, 24, "static(2x2x1)"))
    batch, singles = (
        [Story(world, seed, n, temperature=temperature, tree=tree).prefill() for seed, n, tree in cases]
        for world in (together, alone)
    )
    for _ in range(6):
        drafts = together.drafter.propose([story.ctx for story in batch], [6, 5, 4])
        single = [alone.drafter.propose([s.ctx], [budget])[0] for s, budget in zip(singles, (6, 5, 4), strict=True)]
        assert same_drafts(drafts, single)
        together.drafter.observe([story.verdict(draft) for story, draft in zip(batch, drafts, strict=True)])
        for story, draft in reversed(list(zip(singles, single, strict=True))):
            alone.drafter.observe([story.verdict(draft)])
        for a, b in zip(batch, singles, strict=True):
            assert torch.equal(a.kv_rows(), b.kv_rows()) and torch.equal(a.ctx.state.logits, b.ctx.state.logits)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_handoff_changes_no_proposal(native, temperature):
    here = Story(make_world(native, page_size=8), 10, 21, temperature=temperature).prefill((8,))
    there = Story(make_world(native, page_size=32), 10, 21, temperature=temperature)
    there.ctx.token_ids += there.tokens(1)
    candidates, rows = here.world.drafter.start(here.ctx)
    assert len(candidates.token_ids) == 16 and rows == {}
    for layer in range(4):
        data = here.world.cache.read_rows(GROUP, layer, here.ctx.pages, 0, 22)
        there.world.cache.write_rows(GROUP, layer, there.ctx.pages, 0, 22, data)
    there.world.drafter.resume(there.ctx, candidates, rows)
    assert here.world.drafter.fingerprint() == there.world.drafter.fingerprint()
    for _ in range(5):
        ours = here.world.drafter.propose([here.ctx], [6])
        assert same_drafts(ours, there.world.drafter.propose([there.ctx], [6]))
        here.world.drafter.observe([here.verdict(ours[0])])
        there.world.drafter.observe([there.verdict(ours[0])])
        assert torch.equal(here.kv_rows(), there.kv_rows())


def test_a_damaged_start_and_a_verdict_of_another_sequence_are_refused(native):
    story = Story(make_world(native), 12, 5).prefill()
    drafter = story.world.drafter
    with pytest.raises(TransferDamaged, match="draft_start"):
        drafter.resume(story.ctx, None, {})
    (draft,) = drafter.propose([story.ctx], [6])
    ctx, verdict, hidden = story.verdict(draft, 0)
    with pytest.raises(ValueError, match="draft rows"):
        drafter.observe([(ctx, Verdict(path=(0, 1), output_ids=verdict.output_ids), hidden)])
    with pytest.raises(ValueError, match="draft rows with the root"):
        drafter.propose([ctx], [6])


@pytest.mark.parametrize("tree", ["chain(4)", "static(3x2)"])
@pytest.mark.parametrize("shipped", [False, True])
def test_drawn_children_have_the_law_they_were_drawn_from(native, tree, shipped):
    """q of every inner node, dense and in float64; of the first draft after a handoff cut to the 16 shipped ids."""
    story = Story(make_world(native), 16, 8, temperature=0.9, tree=tree, verify="rejection").prefill()
    drafter = story.world.drafter
    if shipped:
        drafter.resume(story.ctx, *drafter.start(story.ctx))
    (draft,) = drafter.propose([story.ctx], [64])
    inner = {int(parent) for parent in draft.parents}
    assert inner <= draft.laws.keys() and -1 in inner
    every = paths(draft)
    for node in inner:
        path, law = () if node < 0 else every[node], draft.laws[node]
        log_q = (DENSE([*story.ctx.token_ids, *path])[1][-1] / 0.9).log_softmax(-1)[law.token_ids]
        cut = shipped and node < 0
        assert len(law.token_ids) == (16 if cut else CONFIG.vocab_size)
        np.testing.assert_allclose(law.log_q, log_q.log_softmax(-1).numpy(), atol=1e-3)
    logits = torch.randn(1 + draft.num_nodes, CONFIG.vocab_size, generator=torch.Generator().manual_seed(1))
    found = verify(draft, logits, story.ctx.sampling, History.of(story.ctx.token_ids), Seeded(1, 0),
                   root_position=story.ctx.root_position, end_ids=(), max_new=10)
    assert len(found.verdict.output_ids) == found.verdict.num_accepted + 1


# --- models of other vocabularies and contexts -----------------------------------------------------------------------


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
