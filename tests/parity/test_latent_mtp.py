"""DeepSeek's MTP module out of the target's own checkpoint: latent attention and experts as transformers computes
them, and latent draft KV on its way from prefill to decode."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for
from pdspec.model.batch import ForwardBatch
from pdspec.model.native import NativeOps
from pdspec.model.ops import TorchOps
from pdspec.spec.mtp.checkpoint import load_head, save_head
from pdspec.spec.mtp.head import make_modules
from tests.parity.roles import request, running
from tests.tiny_moe import DEEPSEEK, add_mtp_layer, save_moe

ROWS, LAYER = 60, "model.layers.3."
ROW_BYTES = (DEEPSEEK["kv_lora_rank"] + DEEPSEEK["qk_rope_head_dim"]) * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, the target in transformers, the module's tensors)"""
    folder = tmp_path_factory.mktemp("deepseek")
    model = save_moe(folder, "deepseek")
    return folder, model, add_mtp_layer(folder)


def by_transformers(model, module, token_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """h^1 [R, H] of rows that read ``hidden`` and ``token_ids``, by DeepSeek's equations on transformers' own layer."""
    own = {key.removeprefix(LAYER): tensor for key, tensor in module.items()}
    layer, eps = DeepseekV3DecoderLayer(model.config, DEEPSEEK["num_hidden_layers"]).eval(), model.config.rms_norm_eps
    experts = [[own.pop(f"mlp.experts.{e}.{n}_proj.weight") for n in ("gate", "up", "down")]
               for e in range(DEEPSEEK["n_routed_experts"])]
    own["mlp.experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
    own["mlp.experts.down_proj"] = torch.stack([down for *_, down in experts])
    missing, _ = layer.load_state_dict(own, strict=False)
    assert not missing

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        rms = DeepseekV3RMSNorm(len(own[f"{name}.weight"]), eps)
        rms.weight.data.copy_(own[f"{name}.weight"])
        return rms(x)

    embedded = norm("enorm", model.model.embed_tokens(token_ids))
    x = torch.cat((embedded, norm("hnorm", hidden)), 1) @ own["eh_proj.weight"].T
    positions, count = torch.arange(len(x))[None], len(x)
    mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
    tables = model.model.rotary_emb(x[None], positions)
    out = layer(x[None], attention_mask=mask, position_ids=positions, position_embeddings=tables)
    return norm("shared_head.norm", out[0] if out.dim() == 3 else out[0][0])


def rows(token_ids: np.ndarray, start: int) -> ForwardBatch:
    slots = np.arange(start, start + len(token_ids), dtype=np.int32)
    return ForwardBatch(
        token_ids=token_ids, positions=slots, sequence=np.zeros_like(slots), slots=slots, prefix_len=slots + 1,
        ancestors=np.empty((len(slots), 0), np.int32), page_table=np.arange(pages_for(ROWS, 8), dtype=np.int32)[None],
        logit_rows=slots[:0],
    )


def test_the_module_is_that_of_transformers_layer(checkpoint, tmp_path):
    folder, model, module = checkpoint
    save_head(tmp_path, load_head(folder))  # and once more after it was written by us
    ids, kernels = np.random.default_rng(3).integers(0, 256, ROWS).astype(np.int32), NativeOps(1)
    hidden = torch.randn(ROWS, DEEPSEEK["hidden_size"], generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted = by_transformers(model, module, torch.from_numpy(ids.astype(np.int64)), hidden)
    for where in (folder, tmp_path):
        head = load_head(where)
        assert head.config == load_head(folder).config
        group = head.config.cache_group(1, "float32")
        assert group.row_bytes == ROW_BYTES
        for ops in (TorchOps(torch.device("cpu")), kernels):
            (ours,) = make_modules(
                head, 1, ops=ops, embedding=ops.pack(model.model.embed_tokens.weight.data), dtype="float32",
                lm_head=ops.pack(model.lm_head.weight.data), cache=PagedCache((group,), pages_for(ROWS, 8), 8),
                max_positions=2048,
            )
            got = [
                ours.forward(rows(ids[a:b], a), hidden[a:b], np.arange(b - a)) for a, b in ((0, 7), (7, 8), (8, ROWS))
            ]
            assert (torch.cat(got) - wanted).abs().max() < 1e-3
            assert (ours.logits(got[-1]) - wanted[8:] @ model.lm_head.weight.data.T).abs().max() < 1e-3
    kernels.close()


@pytest.mark.parametrize(("reuse", "mode"), [("false", "prefill"), ("true", "prefill"), ("true", "decode")])
def test_it_drafts_behind_a_handoff_and_its_kv_travels_latent(checkpoint, reuse, mode):
    folder = str(checkpoint[0])
    common = {"heads": {"mtp": folder}, "options": {"mtp:reuse": reuse}, "prefill": {"page_size": 8, "chunk": 7}}
    with running(model=folder, dtype="float32", drafter="mtp", drafters=("none", "mtp"), **common) as roles:
        sampling = {"temperature": 0.8, "max_tokens": 20}
        asked = request("mtp", "chain(2)" if reuse == "true" else "chain(1)", sampling=sampling, draft_prefill=mode)
        plain = roles.ask_local(dataclasses.replace(asked, drafter="none", tree=""))
        local = roles.ask_local(asked)
        (handed,) = roles.ask(asked)
        assert handed.tokens == local.tokens == plain.tokens and len(plain.tokens) == 20
        assert handed.traces == local.traces and handed.stats.draft_rebuilds == 0
        n = len(asked.prompt_ids)
        assert handed.stats.kv_bytes == n * DEEPSEEK["num_hidden_layers"] * ROW_BYTES
        assert handed.stats.draft_kv_bytes == (n * ROW_BYTES if mode == "prefill" else 0)
