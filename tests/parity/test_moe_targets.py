"""Targets with experts and latent attention: transformers' logits, the handoff's bytes, and plain decoding's tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for
from pdspec.config import WorkerConfig
from pdspec.engine.resources import load
from pdspec.model.batch import ForwardBatch
from pdspec.model.fingerprint import geometry_hash
from pdspec.model.loader import load_weights, resolve
from pdspec.model.native import NativeOps
from pdspec.model.ops import TorchOps
from pdspec.model.runner import Runner
from tests.parity.roles import request, running
from tests.tiny_moe import CLASSES, DEEPSEEK, add_mtp_layer, save_moe

PROMPT, PAGE = 120, 8
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VARIANTS = {
    "deepseek": ("deepseek", {}),
    "deepseek without yarn, compressed queries or groups": (
        "deepseek",
        {"rope_parameters": DEFAULT_ROPE, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
         "rope_interleave": False, "norm_topk_prob": False},
    ),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe with experts in every other layer": (
        "qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": False},
    ),
}


@pytest.fixture(scope="module")
def kernels():
    ops = NativeOps(1)
    yield ops
    ops.close()


def rows(token_ids: np.ndarray, start: int = 0) -> ForwardBatch:
    """A chunk of one sequence on pages of PAGE rows."""
    slots = np.arange(start, start + len(token_ids), dtype=np.int32)
    pages = np.random.default_rng(5).permutation(pages_for(PROMPT, PAGE)).astype(np.int32)
    return ForwardBatch(
        token_ids=token_ids, positions=slots, sequence=np.zeros_like(slots), slots=slots, prefix_len=slots + 1,
        ancestors=np.empty((len(slots), 0), np.int32), page_table=pages[None],
        logit_rows=np.arange(len(slots), dtype=np.int32),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, kernels, variant):
    kind, changes = VARIANTS[variant]
    theirs, files = save_moe(tmp_path, kind, **changes), resolve(str(tmp_path))
    ids = np.random.default_rng(1).integers(0, 256, PROMPT).astype(np.int32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    for ops in (TorchOps(torch.device("cpu")), kernels):
        runner = Runner(files.config, load_weights(files, "float32"), ops=ops, dtype="float32")
        cache = PagedCache((runner.group,), pages_for(PROMPT, PAGE), PAGE)
        parts = [runner.forward(rows(ids[a:b], a), cache).logits for a, b in ((0, 50), (50, 51), (51, PROMPT))]
        assert (torch.cat(parts) - wanted).abs().max() < 1e-3, ops.name
        assert wanted.std() > 1  # nothing is proven by flat logits


@pytest.mark.parametrize("kind", CLASSES)
def test_exact_holds_in_bf16_and_the_correction_bias_is_not_rounded(tmp_path, kind):
    theirs = save_moe(tmp_path, kind)
    settings = {"drafter": "none", "drafters": ("none",), "cache_tokens": 512, "threads": 1, "numerics": "exact"}
    resources = load(WorkerConfig(model=str(tmp_path), dtype="bfloat16", **settings))
    assert resources.fingerprint["numerics"].startswith("exact/")
    resources.close()
    weights = load_weights(resources.files, "bfloat16")
    stored = dict(theirs.named_buffers())
    for key in (key for key in stored if key.endswith("e_score_correction_bias")):
        assert torch.equal(weights[key], stored[key]) and weights[key].dtype == torch.float32
    assert weights["lm_head.weight"].dtype == torch.bfloat16


def test_mtp_modules_in_the_files_are_no_part_of_the_target(tmp_path):
    save_moe(tmp_path, "deepseek")
    alone = resolve(str(tmp_path))
    add_mtp_layer(tmp_path)
    beside = resolve(str(tmp_path))
    assert beside.content_hash == alone.content_hash and geometry_hash(beside.config) == geometry_hash(alone.config)


@pytest.fixture(scope="module", params=CLASSES)
def served(request, tmp_path_factory):
    """(kind, the two roles over a checkpoint of it)"""
    folder = tmp_path_factory.mktemp(request.param)
    save_moe(folder, request.param)
    with running(
        model=str(folder), dtype="float32", drafters=("none", "ngram", "eagle3", "sparse"), prefill={"page_size": 8},
        options={"sparse:sink": "2", "sparse:select": "snapkv", "sparse:budget": "32", "sparse:window": "4"},
    ) as roles:
        yield request.param, roles


@pytest.mark.parametrize(("drafter", "tree"), [
    ("ngram", "chain(5)"), ("eagle3", "dynamic(3,3,6)"), ("sparse", "static(2x2)"),
])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}])
def test_handoff_and_drafts_give_plain_decodings_tokens(served, drafter, tree, sampling):
    _, roles = served
    assert all(worker.engine.host.resources.fingerprint["numerics"].startswith("exact/")
               for worker in (roles.prefill, roles.decode))
    asked = request(drafter, tree, n=50, sampling={**sampling, "max_tokens": 24})
    plain = roles.ask_local(dataclasses.replace(asked, drafter="none", tree=""))
    local = roles.ask_local(asked)
    (handed,) = roles.ask(asked)
    assert handed.tokens == local.tokens == plain.tokens and len(set(plain.tokens)) > 5
    assert handed.traces == local.traces and handed.stats.draft_rebuilds == 0
    assert drafter != "sparse" or handed.stats.accepted_tokens > 0


def test_bytes_per_token_in_pages_and_on_the_wire_are_those_of_the_formula(served):
    kind, roles = served
    layers = CLASSES[kind][2]["num_hidden_layers"]
    if kind == "deepseek":
        per_token = layers * (DEEPSEEK["kv_lora_rank"] + DEEPSEEK["qk_rope_head_dim"]) * 4
        expanded = DEEPSEEK["num_attention_heads"] * (
            DEEPSEEK["qk_nope_head_dim"] + DEEPSEEK["qk_rope_head_dim"] + DEEPSEEK["v_head_dim"]
        )
        assert per_token < layers * expanded * 4 / 5
    else:
        per_token = layers * 2 * 2 * 16 * 4  # k and v of two heads
    cache = roles.local.resources.cache
    assert cache.group("target").nbytes == cache.num_pages * cache.page_size * per_token
    asked = request("none", n=50)
    (handed,) = roles.ask(asked)
    assert handed.stats.kv_bytes == 50 * per_token
