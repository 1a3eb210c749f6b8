"""MTP modules written from the DeepSeek-V3 report (2412.19437, 2.2): dense, float64, no cache, no batching, and no code
shared with the drafter. What the draft state on a decode worker is compared with."""

from __future__ import annotations

import torch

from pdspec.spec.mtp.checkpoint import Head


class PaperMtp:
    """All modules over a whole token sequence at once. ``shift`` moves the tokens that modules read: a mutation."""

    def __init__(self, head: Head, embedding: torch.Tensor, lm_head: torch.Tensor, *, shift: int = 0) -> None:
        self.w = {name: tensor.double() for name, tensor in head.tensors.items()}
        self.c, self.target_ids, self.shift = head.config, head.target_ids, shift
        self.embedding, self.lm_head = embedding.double(), lm_head.double()[head.target_ids]

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt() * weight

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, heads, D] at positions 0..R-1: pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half = self.c.head_dim // 2
        frequency = self.c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(len(x), half, dtype=torch.float64), torch.arange(len(x))[:, None] * frequency)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    def module(self, m: int, tokens: list[int], features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows i = 0.. of module m read features[i] = h^{m-1}_i and tokens[i] = t_{i+m}: (KV rows [R, 2, kv heads, D],
        h^m [R, H])."""
        c, rows, prefix = self.c, len(tokens), f"model.layers.{self.c.target_layers + m - 1}."

        def w(name: str) -> torch.Tensor:
            return self.w[f"{prefix}{name}.weight"]

        embedded = self.norm(self.embedding[tokens], w("enorm"))
        x = torch.cat((embedded, self.norm(features, w("hnorm"))), -1) @ w("eh_proj").T
        y = self.norm(x, w("input_layernorm"))
        q, k, v = ((y @ w(f"self_attn.{n}_proj").T).view(rows, -1, c.head_dim) for n in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        group = c.num_heads // c.num_kv_heads
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) / c.head_dim**0.5
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(group, 1)).flatten(1)
        x = x + mixed @ w("self_attn.o_proj").T
        y = self.norm(x, w("post_attention_layernorm"))
        gate, up = y @ w("mlp.gate_proj").T, y @ w("mlp.up_proj").T
        x = x + (torch.nn.functional.silu(gate) * up) @ w("mlp.down_proj").T
        return torch.stack((k, v), 1), self.norm(x, w("shared_head.norm"))

    def committed(self, tokens: list[int], final: torch.Tensor) -> list[torch.Tensor]:
        """The final KV rows of modules 1..N with root tokens[n]: n+1-m of module m; final [n, H] are h^0."""
        n, features, kv = len(tokens) - 1, final.double(), []
        for m in range(1, self.c.num_modules + 1):
            rows = max(0, n + 1 - m)
            if rows == 0:
                kv.append(torch.empty(0, 2, self.c.num_kv_heads, self.c.head_dim, dtype=torch.float64))
                continue
            first = m - self.shift
            one, features = self.module(m, tokens[first : first + rows], features[:rows])
            kv.append(one)
        return kv

    def logits(self, tokens: list[int], final: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
        """[draft vocabulary] for the token after the root and then ``path``: of module len(path)+1, row n-1."""
        n, features, known = len(tokens) - 1, final.double(), [*tokens, *path]
        for m in range(1, len(path) + 2):
            first = m - self.shift
            _, features = self.module(m, known[first : first + n], features)
        return self.lm_head @ features[n - 1]

    def reused_logits(self, tokens: list[int], final: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
        """The same where module 1 drafts every depth: its last output is the next row's h."""
        features, following = final.double(), tokens[1:]
        _, outputs = self.module(1, following, features)
        for token in path:
            features, following = torch.cat((features, outputs[-1:])), [*following, token]
            _, outputs = self.module(1, following, features)
        return self.lm_head @ outputs[-1]
