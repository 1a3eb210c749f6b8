"""EAGLE-1 written from the paper (2401.15077) and its authors' layout: dense, float64, no cache, no batching, no code
shared with the drafter. What the draft state on a decode worker is compared with."""

from __future__ import annotations

import torch

from pdspec.spec.eagle1.checkpoint import Head


class PaperEagle1:
    """The head over a whole token sequence at once."""

    def __init__(self, head: Head, embedding: torch.Tensor, lm_head: torch.Tensor) -> None:
        self.w = {name.removeprefix("layers.0."): tensor.double() for name, tensor in head.tensors.items()}
        self.c, self.embedding, self.target_ids = head.config, embedding.double(), head.target_ids
        self.lm_head = lm_head.double()[head.target_ids]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, heads, D] at positions 0..R-1, as 2x2 rotations of the pairs (i, i + D/2)."""
        half = self.c.head_dim // 2
        angle = torch.arange(len(x)).double()[:, None] / self.c.rope_theta ** (torch.arange(half).double() / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def layer(self, next_tokens: list[int], features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row i reads features[i] and next_tokens[i]: (KV rows [R, 2, kv heads, D], outputs [R, H])."""
        c, rows = self.c, len(next_tokens)
        x = torch.cat((self.embedding[next_tokens], features), -1) @ self.w["fc.weight"].T
        if c.bias:
            x = x + self.w["fc.bias"]
        q, k, v = ((x @ self.w[f"self_attn.{n}_proj.weight"].T).view(rows, -1, c.head_dim) for n in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        group = c.num_heads // c.num_kv_heads
        heads = []
        for head in range(c.num_heads):
            scores = q[:, head] @ k[:, head // group].T / c.head_dim**0.5
            visible = torch.arange(rows)[:, None] >= torch.arange(rows)
            heads.append(scores.where(visible, -torch.inf).softmax(-1) @ v[:, head // group])
        hidden = x + torch.cat(heads, -1) @ self.w["self_attn.o_proj.weight"].T
        scale = (hidden.square().mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt()
        y = hidden * scale * self.w["post_attention_layernorm.weight"]
        gate, up = (y @ self.w[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return torch.stack((k, v), 1), hidden + (gate * gate.sigmoid() * up) @ self.w["mlp.down_proj.weight"].T

    def fuse(self, final: torch.Tensor) -> torch.Tensor:
        """A feature is the target's final hidden state."""
        return final.double()

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """[..., draft vocabulary] of outputs [..., H]."""
        return output @ self.lm_head.T

    def committed(self, tokens: list[int], final: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KV rows and outputs of the n rows before the root tokens[n]; final [n, H]."""
        return self.layer(tokens[1:], self.fuse(final))

    def log_q(self, tokens: list[int], final: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
        """Logits [draft vocabulary] for the token after the root and then ``path``."""
        features, following = self.fuse(final), tokens[1:]
        _, outputs = self.layer(following, features)
        for token in path:
            features, following = torch.cat((features, outputs[-1:])), [*following, token]
            _, outputs = self.layer(following, features)
        return self.logits(outputs[-1])
