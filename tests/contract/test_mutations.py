"""The checks of ``pdspec check lossless`` find the bugs that they are there for: each is put into production's code,
and the check named beside it must fail. Without any of them the same checks pass."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import pytest
import torch

from pdspec.config import WorkerConfig
from pdspec.engine.decode import DecodeEngine
from pdspec.engine.local import LocalGenerator
from pdspec.engine.prefill import PrefillEngine
from pdspec.errors import PdspecError
from pdspec.model.loader import load_weights
from pdspec.sampling import pick
from pdspec.spec.chooser import Seeded
from pdspec.spec.draws import candidate_noise
from pdspec.spec.growth import rank_children
from pdspec.spec.mtp.checkpoint import random_head
from pdspec.spec.mtp.config import MtpConfig
from pdspec.spec.mtp.drafter import MtpDrafter
from pdspec.spec.protocol import DraftContext, HiddenRows
from pdspec.spec.ratio import judge
from pdspec.spec.verify import _Verification
from pdspec.study import lossless_paths as paths
from pdspec.study.lossless_joint import joint
from pdspec.study.lossless_law import PROCESSED, PROMPT, law_case
from pdspec.study.mtp_reference import PaperMtp
from pdspec.study.toy import toy_config, write_toys
from pdspec.types import SamplingParams

DRAFTERS = ("none", "ngram", "eagle3")


@dataclass(frozen=True, kw_only=True)
class Bug:
    """In the source of ``function`` the text ``old`` becomes ``new``; ``check`` is the one that must fail."""

    name: str
    function: Any
    old: str
    new: str
    check: str


def law(tree: str) -> Callable[[LocalGenerator], dict[str, Any]]:
    return lambda local: law_case(local, "eagle3", tree, "rejection", PROCESSED, 4)


def sampled(verify: str) -> Callable[[LocalGenerator], dict[str, Any]]:
    return lambda local: joint(local, drafter="eagle3", verify=verify, prompt=PROMPT, params=PROCESSED, seeds=200,
                               progress=lambda _: None)


CHECKS: dict[str, Callable[[LocalGenerator], dict[str, Any]]] = {
    "law chain": law("chain(2)"),
    "law static": law("static(2x1)"),
    "paths.harmful_drafts": lambda local: paths.harmful_drafts(local, 200),
    "paths.plain_law": lambda local: paths.plain_law(local, 300),
    "paths.families": lambda local: paths.families(local, DRAFTERS, 6, 12),
    "paths.samples": lambda local: paths.samples(local, 200),
    "paths.replay": lambda local: paths.replay(local, DRAFTERS, 2),
    "paths.batches": lambda local: paths.batches(local, DRAFTERS, 1),
    "paths.ties": lambda local: paths.ties(local, 10),
    "paths.coupling": lambda local: paths.coupling(local, DRAFTERS, 8),
    "paths.independence": lambda local: paths.independence(local, DRAFTERS, 300),
    "joint rejection": sampled("rejection"),
}
LAWS = "laws=tuple(Law(token_ids=target_ids, log_q=row) for row in log_q.numpy()) if drawn else (),"
BUGS = (
    Bug(
        name="noise indexed by draft id", function=candidate_noise, check="paths.coupling",
        old="target_ids.cpu().numpy()", new="np.arange(len(target_ids))",
    ),
    Bug(
        name="position off by one after a replay", function=PrefillEngine._first, check="paths.replay",
        old="noise(ctx.prompt_len, ids)", new="noise(ctx.prompt_len + (request.replayed > 0), ids)",
    ),
    Bug(
        name="noise reused across samples", function=Seeded.noise, check="paths.samples",
        old="self.sample", new="0",
    ),
    Bug(
        name="ties to the highest id", function=pick, check="paths.ties",
        old="int(scores.argmax())", new="len(scores) - 1 - int(scores[::-1].argmax())",
    ),
    Bug(
        name="greedy draft treated as sampled", function=rank_children, check="law chain",
        old="noise.order(target_ids, row, width)", new="largest(row, width)",
    ),
    Bug(
        name="raw instead of processed logits on p", function=_Verification.support, check="law chain",
        old="support(row, self.params,", new="support(row, SamplingParams(temperature=self.params.temperature),",
    ),
    Bug(
        name="raw instead of processed logits on p, coupled", function=_Verification.support, check="paths.plain_law",
        old="support(row, self.params,", new="support(row, SamplingParams(temperature=self.params.temperature),",
    ),
    Bug(
        name="raw instead of processed logits on q", function=rank_children, check="law chain",
        old=LAWS, new=LAWS.replace("log_q.numpy()", "torch.log_softmax(logits, -1).numpy()"),
    ),
    Bug(
        name="bonus token ignoring top-p", function=_Verification.support, check="law chain",
        old="support(row, self.params,", new="support(row, self.params if not path or self.below(path) else"
        " __import__('dataclasses').replace(self.params, top_p=1.0),",
    ),
    Bug(
        name="bonus token ignoring top-p, coupled", function=_Verification.support, check="paths.harmful_drafts",
        old="support(row, self.params,", new="support(row, self.params if not path or self.below(path) else"
        " __import__('dataclasses').replace(self.params, top_p=1.0),",
    ),
    Bug(
        name="q from bf16 logits while tokens came from float32", function=rank_children, check="law chain",
        old=LAWS, new=LAWS.replace("log_q.numpy()", "draft_scores(logits.bfloat16().float(), temperature, None)[0]"
                                   ".numpy()"),
    ),
    Bug(
        name="sibling residual not renormalised", function=judge, check="law static", old="q /= left", new="pass",
    ),
    Bug(
        name="shared noise with the ratio rule", function=Seeded.order, check="paths.independence",
        old="self.sample + _DRAFT_STREAM", new="self.sample",
    ),
    Bug(
        name="seed lost on a batch change", function=DecodeEngine.step, check="paths.batches",
        old="drafts = self.propose(sequences)",
        new="drafts = self.propose(sequences); changed = self.__dict__.get('size', len(sequences)) != len(sequences);"
            " self.size = len(sequences);"
            " [setattr(s.ctx, 'other_chooser', sequences[0].ctx.chooser) for s in sequences if changed]",
    ),
    Bug(
        name="penalties computed once per batch", function=DecodeEngine.verdicts, check="paths.batches",
        old="results.append(self.judge(",
        new="sequence.history = sequences[0].history; results.append(self.judge(",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("toys")
    write_toys(path)
    return path


@pytest.fixture
def local(folder: Any) -> Iterator[LocalGenerator]:
    generator = LocalGenerator(toy_config(folder, DRAFTERS))
    yield generator
    generator.resources.close()


def mutate(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> None:
    """Whoever calls the function runs the changed code."""
    function = bug.function
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(bug.old) == 1, f"{function.__qualname__} no longer says {bug.old!r}"
    namespace = dict(function.__globals__)
    changed = source.replace(bug.old, bug.new)
    exec(compile(changed, "<mutant>", "exec"), namespace)
    monkeypatch.setattr(function, "__code__", namespace[function.__name__].__code__)


def passes(check: str, local: LocalGenerator) -> bool:
    """A check that cannot finish fails, too."""
    try:
        return bool(CHECKS[check](local)["ok"])
    except (PdspecError, ValueError) as error:
        print(f"{check}: {error}")
        return False


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_bug_every_check_passes(check, local):
    assert CHECKS[check](local)["ok"]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_check_named_beside_a_bug_finds_it(bug, local, monkeypatch):
    mutate(monkeypatch, bug)
    assert not passes(bug.check, local)


UNSHIFTED = Bug(
    name="MTP input unshifted by one", function=MtpDrafter._committed_rows, check="recomputed",
    old="start + m : stop + m", new="start + m - 1 : stop + m - 1",
)


def recomputed(local: LocalGenerator) -> bool:
    """Whether every MTP module's KV of 20 random rows, and its proposal, are those of the report."""
    resources, tokens = local.resources, [(7 * i * i + 3) % 256 for i in range(21)]
    drafter, files = resources.drafter("mtp"), resources.files
    final = torch.randn(20, files.config.hidden_size, generator=torch.Generator().manual_seed(1))
    pages = resources.pool.allocate(8)
    ctx = DraftContext(request_id="r", sampling=SamplingParams(temperature=0.0), noise_key=(1, 0), token_ids=tokens,
                       pages=pages, prompt_len=20, tree="chain(1)")
    drafter.prefill(ctx, HiddenRows(start=0, captured=None, final=final))
    (draft,) = drafter.propose([ctx], [1])
    resources.pool.release(pages)
    head = random_head(MtpConfig.for_target(files.config, files.config.vocab_size // 2, 3), 5)
    weights = load_weights(files, "float32")
    paper = PaperMtp(head, weights["model.embed_tokens.weight"], weights["lm_head.weight"])
    same = int(draft.token_ids[0]) == int(head.target_ids[paper.logits(tokens, final, ()).argmax()])
    for (name, count), wanted in zip(drafter.rows_at(20).items(), paper.committed(tokens, final), strict=True):
        data = bytearray(resources.cache.read_rows(name, 0, pages, 0, count))
        found = torch.frombuffer(data, dtype=torch.float32).view(wanted.shape).double()
        same = same and bool((found - wanted).abs().max() <= 1e-4)
    return same


@pytest.mark.parametrize("bug", [None, UNSHIFTED], ids=["without", "with"])
def test_an_mtp_input_unshifted_by_one_is_found(bug, monkeypatch):
    """Module m reads token i + m in row i."""
    config = WorkerConfig(
        model="tiny", dtype="float32", drafter="mtp", drafters=("mtp",), heads={"mtp": "random:5"}, threads=1,
        options={"mtp:modules": "3"}, cache_tokens=512,
    )  # fmt: skip
    local = LocalGenerator(config)
    try:
        if bug:
            mutate(monkeypatch, bug)
        assert recomputed(local) == (bug is None)
    finally:
        local.resources.close()
