"""A Llama decoder written from the papers: dense, float64, no cache, any attention mask, and no code shared with the
runner. What draft models and sparse views are compared with."""

from __future__ import annotations

import torch

from pdspec.model.config import ModelConfig
from pdspec.noise import gumbel_noise
from pdspec.spec.protocol import Draft, DraftContext


class DenseLlama:
    """``weights`` by Hugging Face key."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
        self.c, self.w = config, {name: tensor.double() for name, tensor in weights.items()}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt() * self.w[f"{name}.weight"]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D] at positions 0..T-1: pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half = self.c.head_dim // 2
        frequency = self.c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(len(x), half, dtype=torch.float64), torch.arange(len(x))[:, None] * frequency)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    def __call__(self, tokens: list[int], seen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(KV rows [layers, T, 2, kv heads, D], logits [T, V]); row i sees the rows ``seen[i]`` (None: 0..i)."""
        count, group, rows = len(tokens), self.c.num_heads // self.c.num_kv_heads, []
        seen = torch.ones(count, count).tril().bool() if seen is None else seen
        x = self.w["model.embed_tokens.weight"][tokens]
        for layer in range(self.c.num_layers):
            name = f"model.layers.{layer}"
            y = self.norm(x, f"{name}.input_layernorm")
            q, k, v = (
                (y @ self.w[f"{name}.self_attn.{n}_proj.weight"].T).view(count, -1, self.c.head_dim) for n in "qkv"
            )
            q, k = self.rotate(q), self.rotate(k)
            rows.append(torch.stack((k, v), 1))
            scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) / self.c.head_dim**0.5
            p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            mixed = torch.einsum("hij,jhd->ihd", p, v.repeat_interleave(group, 1)).flatten(1)
            x = x + mixed @ self.w[f"{name}.self_attn.o_proj.weight"].T
            y = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (y @ self.w[f"{name}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ self.w[f"{name}.mlp.down_proj.weight"].T
        return torch.stack(rows), self.norm(x, "model.norm") @ self.w["lm_head.weight"].T


def child_scores(logits: torch.Tensor, ctx: DraftContext, depth: int) -> torch.Tensor:
    """log-softmax of (log q + g) [V] for the children, at ``depth``, of the node that has ``logits`` [V]."""
    temperature = ctx.sampling.temperature
    if temperature == 0:
        return logits.log_softmax(-1)
    noise = gumbel_noise(*ctx.noise_key, ctx.root_position + depth, token_ids=torch.arange(len(logits)))
    return ((logits / temperature).log_softmax(-1) + noise).log_softmax(-1)


def paths(draft: Draft) -> list[tuple[int, ...]]:
    """Each node as the token ids that lead to it."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.token_ids.tolist(), draft.parents.tolist(), strict=True):
        found.append((*found[parent], token) if parent >= 0 else (token,))
    return found
