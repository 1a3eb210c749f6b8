"""EAGLE-3 written from the papers (2503.01840, 2406.16858): dense, float64, no cache, no batching, and no code shared
with the drafter. What the draft state on a decode worker is compared with."""

from __future__ import annotations

import torch

from pdspec.spec.eagle3.checkpoint import Head


class PaperHead:
    """The head over a whole token sequence at once."""

    def __init__(self, head: Head, embedding: torch.Tensor, lm_head: torch.Tensor | None = None) -> None:
        """``lm_head`` [V, H] is the target's, for heads without one."""
        self.w = {name: tensor.double() for name, tensor in head.tensors.items()}
        self.c, self.embedding, self.target_ids = head.config, embedding.double(), head.target_ids
        if head.config.tied_output and lm_head is not None:
            self.w["lm_head.weight"] = lm_head[head.target_ids].double()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt() * self.w[f"{name}.weight"]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, heads, D] at positions 0..R-1: pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half = self.c.head_dim // 2
        frequency = self.c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(len(x), half, dtype=torch.float64), torch.arange(len(x))[:, None] * frequency)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    def fuse(self, captured: torch.Tensor) -> torch.Tensor:
        """Features [n, H] of captured [n, 3, H]; EAGLE-3.1 norms each level first."""
        levels = captured.double()
        if self.c.fc_norm:
            levels = torch.stack([self.norm(levels[:, i], f"fc_norm.{i}") for i in range(levels.shape[1])], 1)
        return levels.flatten(1) @ self.w["fc.weight"].T

    def layer(self, next_tokens: list[int], features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows i = 0.. read features[i] and next_tokens[i] = t_{i+1}: (KV rows [R, 2, kv heads, D], outputs [R, H])."""
        c, rows = self.c, len(next_tokens)
        embedded = self.norm(self.embedding[next_tokens], "midlayer.input_layernorm")
        x = torch.cat((embedded, self.norm(features, "midlayer.hidden_norm")), -1)
        project = {n: x @ self.w[f"midlayer.self_attn.{n}_proj.weight"].T for n in "qkv"}
        q, k, v = (project[n].view(rows, -1, c.head_dim) for n in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        group = c.num_heads // c.num_kv_heads
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) / c.head_dim**0.5
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(group, 1)).flatten(1)
        hidden = features + mixed @ self.w["midlayer.self_attn.o_proj.weight"].T
        y = self.norm(hidden, "midlayer.post_attention_layernorm")
        gate, up = (y @ self.w[f"midlayer.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        outputs = hidden + (torch.nn.functional.silu(gate) * up) @ self.w["midlayer.mlp.down_proj.weight"].T
        if c.norm_output:  # EAGLE-3.1: what the next row reads
            outputs = self.norm(outputs, "norm")
        return torch.stack((k, v), 1), outputs

    def committed(self, tokens: list[int], captured: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KV rows and outputs of the n rows before the root tokens[n]; captured [n, 3, H]."""
        return self.layer(tokens[1:], self.fuse(captured))

    def log_q(self, tokens: list[int], captured: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
        """Logits [draft vocabulary] for the token after the root and then ``path``."""
        features = self.fuse(captured)
        following = tokens[1:]
        _, outputs = self.layer(following, features)
        for token in path:
            features, following = torch.cat((features, outputs[-1:])), [*following, token]
            _, outputs = self.layer(following, features)
        return self.logits(outputs[-1])

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """[..., draft vocabulary] of outputs [..., H]."""
        normed = output if self.c.norm_output else self.norm(output, "norm")
        return normed @ self.w["lm_head.weight"].T
