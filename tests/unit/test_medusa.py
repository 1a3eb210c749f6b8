"""The Medusa drafter against the paper: its scores and trees, after the prefill and after verifications."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from eagle3_reference import paths

from pdspec.errors import InvalidRequest, TransferDamaged
from pdspec.noise import gumbel_noise
from pdspec.sampling import History
from pdspec.spec.chooser import Seeded
from pdspec.spec.medusa.checkpoint import Heads, random_heads
from pdspec.spec.medusa.config import MedusaConfig
from pdspec.spec.medusa.drafter import MedusaDrafter
from pdspec.spec.medusa.head import MedusaHeads
from pdspec.spec.protocol import DraftContext, HiddenRows, Verdict
from pdspec.spec.verify import verify
from pdspec.types import SamplingParams, Verify

HIDDEN, VOCABULARY = 48, 120
CONFIG = MedusaConfig(hidden_size=HIDDEN, vocab_size=VOCABULARY, draft_vocab_size=40, num_heads=4, num_layers=2)
SHARED = random_heads(CONFIG, 1)
OWN = random_heads(replace(CONFIG, own_lm_heads=True, draft_vocab_size=VOCABULARY, num_layers=1), 2)
LM_HEAD = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(3)) / HIDDEN**0.5 * 3


def paper(heads: Heads, hidden: torch.Tensor, k: int) -> torch.Tensor:
    """Logits [draft vocabulary] of head k (from 0) at one hidden state [H], float64: Cai et al. 2024, section 3.1."""
    x = hidden.double()
    for j in range(heads.config.num_layers):
        inner = heads.tensors[f"{k}.{j}.linear.weight"].double() @ x + heads.tensors[f"{k}.{j}.linear.bias"].double()
        x = x + inner * torch.sigmoid(inner)
    own = heads.tensors.get(f"{k}.{heads.config.num_layers}.weight")
    return (LM_HEAD[heads.target_ids] if own is None else own).double() @ x


def make(ops, heads=SHARED, **changes) -> MedusaDrafter:
    model = MedusaHeads(heads, ops=ops, lm_head=ops.pack(LM_HEAD), dtype="float32")
    return MedusaDrafter(heads, model, dtype="float32", **changes)


@dataclass(kw_only=True)
class Story:
    """One sequence: random tokens, random hidden states, random acceptance; the same for the same seed."""

    drafter: MedusaDrafter
    seed: int
    length: int = 9
    tree: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.final = self.hidden(self.length)
        self.ctx = DraftContext(
            request_id=f"story-{self.seed}", sampling=self.sampling, noise_key=(self.seed, 0), pages=[],
            token_ids=self.tokens(self.length), prompt_len=self.length, tree=self.tree,
        )

    def tokens(self, count: int) -> list[int]:
        return self.random.integers(0, VOCABULARY, count).tolist()

    def hidden(self, count: int) -> torch.Tensor:
        return torch.from_numpy(self.random.standard_normal((count, HIDDEN)).astype(np.float32))

    def prefill(self, cuts: tuple[int, ...] = ()) -> Story:
        for a, b in pairwise([0, *cuts, self.length]):
            if b == self.length:
                self.ctx.token_ids += self.tokens(1)
            self.drafter.prefill(self.ctx, HiddenRows(start=a, captured=None, final=self.final[a:b]))
        return self

    def propose(self, budget: int = 64):
        return self.drafter.propose([self.ctx], [budget])[0]

    def verdict(self, draft):
        node = int(self.random.integers(-1, draft.num_nodes))
        path: list[int] = []
        while node >= 0:
            path.insert(0, node)
            node = int(draft.parents[node])
        outputs = [int(draft.token_ids[node]) for node in path] + self.tokens(1)
        hidden, start = self.hidden(len(outputs)), self.ctx.root_position
        self.final = torch.cat((self.final, hidden))
        self.ctx.token_ids += outputs
        return self.ctx, Verdict(path=tuple(path), output_ids=tuple(outputs)), HiddenRows(
            start=start, captured=None, final=hidden
        )

    def scores(self, depth: int, heads: Heads = SHARED) -> tuple[torch.Tensor, torch.Tensor]:
        """(log q, what trees rank by) [draft vocabulary] at a depth, from the paper and the tokens alone."""
        assert len(self.final) == self.ctx.root_position
        logits, temperature = paper(heads, self.final[-1], depth - 1), self.sampling.temperature
        log_q = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            return log_q, log_q
        noise = gumbel_noise(*self.ctx.noise_key, self.ctx.root_position + depth, token_ids=heads.target_ids)
        return log_q, (log_q + noise).log_softmax(-1)


def best(story: Story, depth: int, count: int, heads: Heads = SHARED) -> list[tuple[int, float]]:
    """(target id, score) of the ``count`` best children at a depth."""
    _, score = story.scores(depth, heads)
    top = score.topk(count)
    return list(zip(heads.target_ids[top.indices].tolist(), top.values.tolist(), strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("heads", [SHARED, OWN], ids=["shared", "own"])
def test_after_the_prefill_and_each_of_20_verifications_state_and_chain_equal_a_recompute(ops, heads, temperature):
    drafter = make(ops, heads)
    params = SamplingParams(temperature=temperature)
    stories = [
        Story(drafter=drafter, seed=seed, length=n, tree="chain(4)", sampling=params).prefill(cuts)
        for seed, n, cuts in ((1, 1, ()), (2, 13, (5, 6)), (3, 24, ()))
    ]
    accepted = set()
    for _ in range(21):
        drafts = drafter.propose([story.ctx for story in stories], [4] * 3)
        for story, draft in zip(stories, drafts, strict=True):
            assert torch.equal(story.ctx.state.hidden, story.final[-1:])
            assert draft.parents.tolist() == [-1, 0, 1, 2]
            for depth in range(1, 5):
                logits = drafter.model.logits(story.ctx.state.hidden, depth - 1)[0].double()
                torch.testing.assert_close(logits, paper(heads, story.final[-1], depth - 1), atol=1e-4, rtol=0)
                log_q, score = story.scores(depth, heads)
                index = int(score.argmax())
                assert draft.token_ids[depth - 1] == int(heads.target_ids[index])
                assert draft.log_q[depth - 1] == pytest.approx(float(log_q[index]), abs=1e-4)
        news = [story.verdict(draft) for story, draft in zip(stories, drafts, strict=True)]
        accepted |= {verdict.num_accepted for _, verdict, _ in news}
        drafter.observe(news)
    assert accepted == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_static_tree_is_the_product_of_the_levels(ops, temperature):
    story = Story(drafter=make(ops), seed=4, tree="static(3x2x1)", sampling=SamplingParams(temperature=temperature))
    draft = story.prefill().propose()
    levels = [[token for token, _ in best(story, depth, count)] for depth, count in ((1, 3), (2, 2), (3, 1))]
    assert paths(draft) == [path for depth in (1, 2, 3) for path in product(*levels[:depth])]


def test_a_published_shape_is_drafted_whole(ops):
    draft = Story(drafter=make(ops), seed=4, tree="static(vicuna_7b_stage2)").prefill().propose()
    assert draft.num_nodes == 63 and max(map(len, paths(draft))) == 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(3, 3, 6), (2, 5, 20), (4, 4, 4)])
def test_a_dynamic_tree_has_the_likeliest_products(ops, temperature, shape):
    """Of shapes for which EAGLE-2's search, which goes on from ``top_k`` nodes a level, finds them all."""
    depth, top_k, nodes = shape
    sampling = SamplingParams(temperature=temperature)
    story = Story(drafter=make(ops), seed=5, tree=f"dynamic({depth},{top_k},{nodes})", sampling=sampling).prefill()
    for _ in range(4):
        draft = story.propose()
        levels = [best(story, d, top_k) for d in range(1, depth + 1)]
        scores = {tuple(t for t, _ in path): sum(s for _, s in path)
                  for d in range(1, depth + 1) for path in product(*levels[:d])}
        expected = sorted(scores, key=lambda path: -scores[path])[:nodes]
        found = dict(zip(paths(draft), draft.survival.tolist(), strict=True))
        assert found == pytest.approx({path: float(np.exp(scores[path])) for path in expected}, abs=1e-4)
        story.drafter.observe([story.verdict(draft)])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bits_do_not_depend_on_the_batch(native, temperature):
    trees, budgets = ["chain(4)", "static(2x2)", "dynamic(4,4,8)", "", "chain(3)"], [4, 6, 8, 0, 2]

    def stories():
        drafter = make(native)
        sampling = SamplingParams(temperature=temperature)
        return drafter, [
            Story(drafter=drafter, seed=20 + i, length=3 + 5 * i, tree=tree, sampling=sampling).prefill()
            for i, tree in enumerate(trees)
        ]

    (together, batch), (_, singles) = stories(), stories()
    for _ in range(6):
        drafts = together.propose([story.ctx for story in batch], budgets)
        for story, budget, draft in zip(singles, budgets, drafts, strict=True):
            alone = story.propose(budget)
            for name in ("token_ids", "parents", "log_q", "survival"):
                np.testing.assert_array_equal(getattr(alone, name), getattr(draft, name))
            story.drafter.observe([story.verdict(alone)])
        together.observe([story.verdict(draft) for story, draft in zip(batch, drafts, strict=True)])


@pytest.mark.parametrize("sampling", [
    SamplingParams(), SamplingParams(temperature=0.8), SamplingParams(temperature=0.8, verify=Verify.REJECTION),
], ids=["greedy", "coupled", "rejection"])
def test_a_handoff_changes_no_proposal(native, sampling):
    here, there = (
        Story(drafter=make(native), seed=10, length=21, tree="static(3x2)", sampling=sampling) for _ in range(2)
    )
    candidates, rows = here.prefill((8,)).drafter.start(here.ctx)
    assert torch.equal(rows["hidden"], here.final[-1:])
    _, score = here.scores(1)
    if sampling.verify == Verify.COUPLED:
        assert candidates.token_ids.tolist() == SHARED.target_ids[score.topk(16).indices].tolist()
    there.ctx.token_ids += there.tokens(1)
    there.drafter.resume(there.ctx, candidates, {"hidden": rows["hidden"].clone()})
    here.drafter.resume(here.ctx, candidates, rows)
    for _ in range(4):
        ours, theirs = here.propose(), there.propose()
        for name in ("token_ids", "parents", "log_q", "survival"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        here.drafter.observe([here.verdict(ours)])
        there.drafter.observe([there.verdict(theirs)])


def test_what_was_drawn_has_a_law_at_every_inner_node_and_verification_keeps_the_target_s_distribution(native):
    """Joint (t1, t2) over seeds against p(t1) p(t2 | t1), within four standard deviations for each pair."""
    config = replace(CONFIG, vocab_size=6, draft_vocab_size=4, num_heads=2, num_layers=1)
    heads = random_heads(config, 5)
    model = MedusaHeads(heads, ops=native, lm_head=native.pack(LM_HEAD[:6]), dtype="float32")
    drafter = MedusaDrafter(heads, model, dtype="float32", tree="static(2x2)")
    table = torch.randn(7, 6, generator=torch.Generator().manual_seed(6)) * 1.2  # the target: next logits by last token
    sampling = SamplingParams(temperature=1.0, verify=Verify.REJECTION)
    final = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(7))
    counts, runs, accepted = np.zeros((6, 6)), 3000, 0
    for seed in range(runs):
        ctx = DraftContext(request_id="r", sampling=sampling, noise_key=(seed, 0), token_ids=[1, 0], pages=[],
                           prompt_len=1, tree="static(2x2)")
        drafter.prefill(ctx, HiddenRows(start=0, captured=None, final=final))
        if seed % 2:
            drafter.resume(ctx, *drafter.start(ctx))
        (draft,) = drafter.propose([ctx], [6])
        inner = set(draft.parents.tolist())
        assert draft.laws.keys() == inner and draft.num_nodes == 6
        assert draft.laws[0] is draft.laws[1]
        for node in inner:
            children = draft.token_ids[draft.parents == node].tolist()
            assert len(set(children)) == 2 and set(children) <= set(draft.laws[node].token_ids.tolist())
        logits = torch.stack([table[6], *(table[int(token)] for token in draft.token_ids)])
        # a token more than the tree decides is drawn from the node's own row, as an engine's next step would
        found = verify(draft, logits, sampling, History.of([1, 0], []), Seeded(seed, 0), root_position=1, end_ids=(),
                       max_new=2).verdict
        accepted += found.num_accepted
        first = found.output_ids[0]
        if len(found.output_ids) == 2:
            counts[first, found.output_ids[1]] += 1
        else:
            p = table[first].softmax(-1).numpy()
            counts[first] += p  # the expectation over what plain decoding would draw
    expected = (table[6].softmax(-1)[:, None] * table[:6].softmax(-1)).numpy()
    deviation = np.sqrt(runs * expected * (1 - expected))
    assert accepted > runs / 4
    assert (np.abs(counts - runs * expected) <= 4 * deviation + 1).all()


def test_trees_deeper_than_the_heads_are_refused_with_the_limit(ops):
    drafter = make(ops)
    assert drafter.depth("chain(4)") == 4 and drafter.depth("") == 2
    for tree in ("chain(5)", "dynamic(5,2,8)", "static(mc_sim_7b_63)", "static(1x1x1x1x1)"):
        with pytest.raises(InvalidRequest, match="keep to 4 levels, one for each head, and 64 nodes"):
            drafter.depth(tree)
    with pytest.raises(InvalidRequest, match="64 nodes"):
        drafter.depth("static(65)")
    single = make(ops, random_heads(replace(CONFIG, num_heads=1), 1))
    assert single.default_tree == "chain(1)" and single.depth("") == 1


def test_a_damaged_start_and_other_peoples_rows_are_refused(ops):
    story = Story(drafter=make(ops), seed=12).prefill()
    drafter, (candidates, rows) = story.drafter, story.drafter.start(story.ctx)
    short = replace(candidates, token_ids=candidates.token_ids[:3])
    for what in ((None, rows), (short, rows), (candidates, {}), (candidates, {"hidden": rows["hidden"][:, :7]})):
        with pytest.raises(TransferDamaged, match="draft_start"):
            drafter.resume(story.ctx, *what)
    ctx, verdict, hidden = story.verdict(story.propose())
    for wrong in (replace(hidden, start=hidden.start + 1), replace(hidden, final=hidden.final.repeat(2, 1))):
        with pytest.raises(ValueError, match="hidden rows"):
            drafter.observe([(ctx, verdict, wrong)])
    with pytest.raises(ValueError, match="target rows seen with the root"):
        drafter.propose([ctx], [2])
    with pytest.raises(ValueError, match="hidden rows"):
        drafter.prefill(ctx, HiddenRows(start=3, captured=None, final=hidden.final))
