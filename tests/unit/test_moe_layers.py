"""What experts and latent attention are made of: public geometries, routing, attention over latent rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import batch_of, pick

from pdspec.cache.paged import PagedCache
from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.config import parse_config, weight_shapes
from pdspec.model.native import NativeOps
from pdspec.model.ops import TorchOps, make_rope
from pdspec.model.variants import Moe
from pdspec.types import CacheGroup

BASE: dict[str, Any] = {"rms_norm_eps": 1e-6, "vocab_size": 1000, "tie_word_embeddings": False}
DEEPSEEK_V3: dict[str, Any] = {
    **BASE, "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
}
MIXTRAL_8X7B: dict[str, Any] = {
    **BASE, "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
    "num_experts_per_tok": 2, "rope_theta": 1e6, "max_position_embeddings": 32768, "sliding_window": None,
}
QWEN3_30B: dict[str, Any] = {
    **BASE, "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "rope_theta": 1e6, "max_position_embeddings": 40960,
}
GROUPED = Moe(
    num_experts=16, experts_per_token=4, expert_size=16, dense_layers=(), scoring="sigmoid", scaling=2.5, bias=True,
    groups=4, groups_per_token=2,
)
PLAIN = Moe(num_experts=60, experts_per_token=4, expert_size=16, dense_layers=(), normalise=False)


@pytest.fixture(scope="module", params=["native", "16"])
def ops(request):
    ops = NativeOps(2, *(() if request.param == "native" else ("-DPDSPEC_VECTOR_BYTES=16",)))
    yield ops
    ops.close()


@pytest.mark.parametrize(("values", "per_token", "parameters"), [
    (DEEPSEEK_V3, 61 * (512 + 64) * 2, 671.0e9), (MIXTRAL_8X7B, 32 * 2 * 8 * 128 * 2, 46.7e9),
    (QWEN3_30B, 48 * 2 * 4 * 128 * 2, 30.5e9),
])
def test_public_configs_have_their_known_sizes(values, per_token, parameters):
    vocabulary = {"DeepseekV3ForCausalLM": 129280, "MixtralForCausalLM": 32000, "Qwen3MoeForCausalLM": 151936}
    config = parse_config({**values, "vocab_size": vocabulary[values["architectures"][0]]}, "m")
    group = config.target_group("bfloat16")
    assert group.num_layers * group.row_bytes == per_token
    assert sum(np.prod(shape) for shape in weight_shapes(config).values()) == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize(("changes", "named"), [
    ({"scoring_func": "softmax"}, "scoring_func to 'softmax'"), ({"topk_method": "greedy"}, "topk_method to 'greedy'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq"), ({"quantization_config": {"quant_method": "fp8"}}, "quantization_"),
    ({"attention_bias": True}, "attention_bias"), ({"n_group": 7}, "256 experts in 7 groups"),
    ({"topk_group": 9}, "topk_group=9 of n_group=8"), ({"num_experts_per_tok": 129}, "num_experts_per_tok=129 of 128"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 is odd"), ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
])
def test_what_cannot_be_run_is_named(changes, named):
    with pytest.raises((ConfigError, CheckpointError), match=named):
        parse_config({**DEEPSEEK_V3, **changes}, "m")


@pytest.mark.parametrize("moe", [GROUPED, PLAIN])
def test_routing_is_torchs_and_a_rows_choice_is_its_own(ops, moe):
    logits = 2 * torch.randn(50, moe.num_experts, generator=torch.Generator().manual_seed(3))
    bias = torch.linspace(-0.5, 0.5, moe.num_experts) if moe.bias else None
    ids, weights = ops.route(logits, moe, bias)
    expected_ids, expected = TorchOps(torch.device("cpu")).route(logits, moe, bias)
    assert np.array_equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    if moe.normalise:
        torch.testing.assert_close(weights.sum(1), torch.full((50,), moe.scaling))
    for row in range(50):
        own_ids, own = ops.route(logits[row : row + 1].contiguous(), moe, bias)
        assert np.array_equal(own_ids[0], ids[row]) and torch.equal(own[0], weights[row])


def test_routing_takes_the_lowest_of_equals_and_survives_poison(ops):
    ids, weights = ops.route(torch.zeros(1, 60), PLAIN, None)
    assert ids[0].tolist() == [0, 1, 2, 3] and weights[0].tolist() == pytest.approx([1 / 60] * 4)
    ids, weights = ops.route(torch.full((1, 16), torch.nan), GROUPED, torch.zeros(16))
    assert len(set(ids[0])) == 4 and ids.min() >= 0 and ids.max() < 16 and weights.isnan().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("ancestors", [False, True])
def test_attention_over_latent_rows_is_torchs_and_a_row_ignores_its_neighbours(ops, dtype, ancestors):
    dim, heads = 576, 20  # DeepSeek-V3's row; more heads than one kernel call takes
    group = CacheGroup(name="target", num_layers=1, num_kv_heads=1, head_dim=dim, dtype=dtype, parts=1)
    cache = PagedCache((group,), 40, 8)
    layer, generator = cache.group("target")[0], torch.Generator().manual_seed(1)
    layer.copy_(torch.randn(layer.shape, generator=generator))
    batch, q = batch_of(9, ancestors=ancestors), torch.randn(9, heads, dim, generator=generator)
    whole = ops.attend(q, batch, layer)
    torch.testing.assert_close(whole, TorchOps(torch.device("cpu")).attend(q, batch, layer), rtol=1e-3, atol=1e-4)
    for rows in ([0], [8], [3, 4], [2, 8, 5]):
        assert torch.equal(ops.attend(q[rows].contiguous(), pick(batch, rows), layer), whole[rows])


@pytest.mark.parametrize("rule", [
    {}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2},
    {"truncate": False},
])
def test_yarn_is_that_of_transformers(rule):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, **rule}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=512,
        rope_parameters={"rope_theta": 5000.0, **scaling},
    )
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    rope = make_rope(head_dim=64, theta=5000.0, max_positions=300, scaling=scaling)
    angle = torch.arange(300, dtype=torch.float64)[:, None] * inverse.double()
    torch.testing.assert_close(rope.cos, (factor * angle.cos()).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rope.sin, (factor * angle.sin()).float(), rtol=1e-4, atol=1e-4)
