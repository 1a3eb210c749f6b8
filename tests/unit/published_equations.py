"""Draft heads written from their published equations, dense, float64, over the tensors under their *published* names:
no cache, no batching, and no code of the project. Each is called with the tokens that rows read and with the target's
features, and returns the hidden states that it gives the next row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]
Read = Callable[[str], torch.Tensor]


def reader(weights: Weights, prefix: str = "") -> Read:
    return lambda name: weights[f"{prefix}{name}"].double()


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def swiglu(x: torch.Tensor, w: Read) -> torch.Tensor:
    return (silu(x @ w("gate_proj.weight").T) * (x @ w("up_proj.weight").T)) @ w("down_proj.weight").T


def frequencies(dim: int, theta: float) -> torch.Tensor:
    return theta ** (-torch.arange(0, dim, 2).double() / dim)


def yarn(dim: int, theta: float, rule: Mapping[str, Any]) -> torch.Tensor:
    """2309.00071, 3.2 and DeepSeek-V3's constants: pairs that turn more than ``beta_fast`` times within the original
    context keep their frequency, those that turn less than ``beta_slow`` times have it divided by ``factor``."""
    plain, original = frequencies(dim, theta), rule["original_max_position_embeddings"]
    edges = [dim * math.log(original / (2 * math.pi * beta)) / (2 * math.log(theta))
             for beta in (rule["beta_fast"], rule["beta_slow"])]  # fmt: skip
    low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), dim - 1)
    share = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)]
    return torch.stack([f / rule["factor"] * s + f * (1 - s) for f, s in zip(plain, share, strict=True)])


def turn(x: torch.Tensor, frequency: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """RoPE of x [R, heads, D] at positions 0..R-1 on the first 2 · len(frequency) values of a head: pairs (i, i + half)
    or (2i, 2i + 1)."""
    half, out = len(frequency), x.clone()
    for position in range(len(x)):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            cos, sin = math.cos(position * frequency[i]), math.sin(position * frequency[i])
            out[position, :, a] = x[position, :, a] * cos - x[position, :, b] * sin
            out[position, :, b] = x[position, :, a] * sin + x[position, :, b] * cos
    return out


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[R, Hq · value] of q [R, Hq, D], k [R, Hk, D], v [R, Hk, value]."""
    rows, group, heads = len(q), q.shape[1] // k.shape[1], []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T * scale
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, head // group])
    return torch.cat(heads, -1)


def attention(x: torch.Tensor, w: Read, c: Mapping[str, Any]) -> torch.Tensor:
    """Llama's; with ``bias`` Qwen2's, ``norms`` Qwen3's, ``gated`` Qwen3-Next's (norms then multiply by 1 + weight)."""
    dim = c["head_dim"]
    projected = {n: x @ w(f"{n}_proj.weight").T + (w(f"{n}_proj.bias") if c.get("bias") else 0) for n in "qkv"}
    q, k, v = (projected[n].view(len(x), -1, dim) for n in "qkv")
    if c.get("gated"):
        q, gate = projected["q"].view(len(x), -1, 2 * dim).split(dim, -1)
    if c.get("norms"):
        one = 1.0 if c.get("gated") else 0.0
        q, k = rms(q, w("q_norm.weight") + one, c["eps"]), rms(k, w("k_norm.weight") + one, c["eps"])
    turned = frequencies(c.get("turned", dim), c["theta"])
    mixed = causal(turn(q, turned), turn(k, turned), v, dim**-0.5)
    if c.get("gated"):
        mixed = mixed / (1 + (-gate.reshape(len(x), -1)).exp())
    return mixed @ w("o_proj.weight").T


def latent_attention(x: torch.Tensor, w: Read, c: Mapping[str, Any]) -> torch.Tensor:
    """DeepSeek-V2, 2405.04434, equations 9 to 19; the softmax scale times YaRN's temperature squared."""
    plain, turned, value, heads = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["heads"]
    q = rms(x @ w("q_a_proj.weight").T, w("q_a_layernorm.weight"), c["eps"]) @ w("q_b_proj.weight").T
    q = q.view(len(x), heads, plain + turned)
    compressed = x @ w("kv_a_proj_with_mqa.weight").T
    latent = rms(compressed[:, : c["kv_lora_rank"]], w("kv_a_layernorm.weight"), c["eps"])
    kv = (latent @ w("kv_b_proj.weight").T).view(len(x), heads, plain + value)
    rule = c["rope_scaling"]
    frequency = yarn(turned, c["theta"], rule)
    q_turned = turn(q[..., plain:], frequency, interleaved=True)
    k_turned = turn(compressed[:, None, c["kv_lora_rank"] :], frequency, interleaved=True).expand(-1, heads, -1)
    temperature = 0.1 * rule["mscale_all_dim"] * math.log(rule["factor"]) + 1
    mixed = causal(torch.cat((q[..., :plain], q_turned), -1), torch.cat((kv[..., :plain], k_turned), -1),
                   kv[..., plain:], (plain + turned) ** -0.5 * temperature**2)
    return mixed @ w("o_proj.weight").T


def qwen_experts(x: torch.Tensor, w: Read, expert: Callable[[int], Read], chosen: int, count: int) -> torch.Tensor:
    """Qwen3-Next: softmax over all experts, the best ``chosen`` renormalised; a shared expert times its gate."""
    rows = []
    for row in x:
        scores = (w("gate.weight") @ row).softmax(-1)
        best = sorted(range(count), key=lambda e: -float(scores[e]))[:chosen]
        total = sum(scores[e] for e in best)
        routed = sum(scores[e] / total * swiglu(row[None], expert(e))[0] for e in best)
        gate = 1 / (1 + (-(w("shared_expert_gate.weight") @ row)).exp())
        rows.append(routed + gate * swiglu(row[None], lambda name: w(f"shared_expert.{name}"))[0])
    return torch.stack(rows)


def deepseek_experts(x: torch.Tensor, w: Read, c: Mapping[str, Any]) -> torch.Tensor:
    """DeepSeek-V3 report, equations 12 to 16 and 2.1.2: the bias is for the choice alone, among the best groups."""
    size, rows = c["n_routed_experts"] // c["n_group"], []
    for row in x:
        scores = 1 / (1 + (-(w("gate.weight") @ row)).exp())
        wanted = scores + w("gate.e_score_correction_bias")
        groups = sorted(range(c["n_group"]), key=lambda g: -float(wanted[g * size : (g + 1) * size].topk(2)[0].sum()))
        allowed = [g * size + i for g in groups[: c["topk_group"]] for i in range(size)]
        best = sorted(allowed, key=lambda e: -float(wanted[e]))[: c["num_experts_per_tok"]]
        total = sum(scores[e] for e in best)
        routed = sum(scores[e] / total * swiglu(row[None], lambda n, e=e: w(f"experts.{e}.{n}"))[0] for e in best)
        shared = swiglu(row[None], lambda n: w(f"shared_experts.{n}"))[0]
        rows.append(c["routed_scaling_factor"] * routed + shared)
    return torch.stack(rows)


def eagle1(embedded: torch.Tensor, features: torch.Tensor, fc: Read, layer: Read, c: Mapping[str, Any]) -> torch.Tensor:
    """2401.15077, section 4.1, with the authors' layer: no norm before attention, none at the end."""
    x = torch.cat((embedded, features), -1) @ fc("weight").T + (fc("bias") if c["fc_bias"] else 0)
    x = x + attention(x, lambda n: layer(f"self_attn.{n}"), c)
    return x + swiglu(rms(x, layer("post_attention_layernorm.weight"), c["eps"]), lambda n: layer(f"mlp.{n}"))


def eagle3(embedded: torch.Tensor, levels: torch.Tensor, w: Read, layer: Read, c: Mapping[str, Any]) -> torch.Tensor:
    """2503.01840, section 3.1; levels [R, 3, H] are the target's."""
    fused = levels.flatten(1)
    if c.get("norm_before_fc"):
        fused = rms(fused, w("input_norm.weight"), c["eps"])
    h = fused @ w("fc.weight").T
    normed = rms(h, layer("hidden_norm.weight"), c["eps"])
    x = torch.cat((rms(embedded, layer("input_layernorm.weight"), c["eps"]), normed), -1)
    h = (normed if c.get("norm_before_residual") else h) + attention(x, lambda n: layer(f"self_attn.{n}"), c)
    return h + swiglu(rms(h, layer("post_attention_layernorm.weight"), c["eps"]), lambda n: layer(f"mlp.{n}"))


def mtp(
    embedded: torch.Tensor, h: torch.Tensor, norms: Mapping[str, torch.Tensor], projection: torch.Tensor,
    attend: Callable[[torch.Tensor], torch.Tensor], mlp: Callable[[torch.Tensor], torch.Tensor], eps: float, *,
    hidden_first: bool = False,
) -> torch.Tensor:
    """DeepSeek-V3 report, equations 21 to 23; norms: token, hidden, input, post, final."""
    parts = [rms(embedded, norms["token"], eps), rms(h, norms["hidden"], eps)]
    x = torch.cat(parts[::-1] if hidden_first else parts, -1) @ projection.T
    x = x + attend(rms(x, norms["input"], eps))
    return rms(x + mlp(rms(x, norms["post"], eps)), norms["final"], eps)
