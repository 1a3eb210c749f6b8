"""EAGLE-3 with training-time test (Li et al., 2503.01840): the head is trained on its own outputs.

Row i reads the target's features h_i and token t_{i+1} and predicts t_{i+2}. In step j ≥ 1 the same row reads its
own output of step j-1 and t_{i+1+j}, stands at position i+j, and predicts t_{i+2+j}; it attends to the target-made
rows 0..i and to its own rows of steps 1..j, exactly as a chain drafted from row i does. Sequences are packed, not
padded: F rows in all, of which only those that predict answer tokens ask a query.

Loss of a row: cross-entropy of q against the target's distribution over the draft vocabulary; rows whose best target
token lies outside that vocabulary are masked; step j counts 0.8^j. One target forward serves all steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pdspec.model.ops import Rope, make_rope
from pdspec.spec.eagle3.checkpoint import Head, save_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.heads import TargetIdentity
from pdspec.train.packing import Example, Keys, Packed, alive_in
from pdspec.train.scoring import (
    StepScores,
    TargetParts,
    draft_ids_of,
    rms,
    rotate,
    score,
    teacher,
    weighted,
)

DECAY = 0.8


def new_tensors(
    config: Eagle3Config, target: dict[str, torch.Tensor], target_ids: torch.Tensor, num_layers: int, seed: int
) -> dict[str, torch.Tensor]:
    """Starting weights under SafeAILab's keys. Features start as the last fused level; norms, attention over features
    and (where it fits) the MLP start as the target's last layer; lm_head as the target's output rows; the rest random.

    ``target`` has Hugging Face keys; its tensors are copied."""
    random = torch.Generator().manual_seed(seed)
    hidden = config.hidden_size
    tensors = {name: 0.02 * torch.randn(shape, generator=random) for name, shape in config.matrix_shapes().items()}
    tensors["fc.weight"][:, -hidden:] += torch.eye(hidden)
    last = f"model.layers.{num_layers - 1}."
    for letter in "qkv":
        tensors[f"midlayer.self_attn.{letter}_proj.weight"][:, hidden:] = target[
            f"{last}self_attn.{letter}_proj.weight"
        ].float()
    tensors["midlayer.self_attn.o_proj.weight"] = target[f"{last}self_attn.o_proj.weight"].float().clone()
    for name in ("gate_proj", "up_proj", "down_proj"):
        source = target[f"{last}mlp.{name}.weight"]
        if tuple(source.shape) == config.matrix_shapes()[f"midlayer.mlp.{name}.weight"]:
            tensors[f"midlayer.mlp.{name}.weight"] = source.float().clone()
    output = target.get("lm_head.weight", target["model.embed_tokens.weight"])
    tensors["lm_head.weight"] = output[target_ids].float()
    tensors["midlayer.hidden_norm.weight"] = target[f"{last}input_layernorm.weight"].float().clone()
    tensors["midlayer.post_attention_layernorm.weight"] = (
        target[f"{last}post_attention_layernorm.weight"].float().clone()
    )
    tensors["norm.weight"] = target["model.norm.weight"].float().clone()
    tensors["midlayer.input_layernorm.weight"] = torch.ones(hidden)
    return tensors


class Eagle3Trainer:
    """The head as torch autograd sees it. ``parameters`` have SafeAILab's keys, float32."""

    def __init__(
        self,
        config: Eagle3Config,
        parameters: dict[str, torch.nn.Parameter],
        target_ids: torch.Tensor,
        parts: TargetParts,
        max_positions: int,
    ) -> None:
        self.config, self.parameters, self.target_ids, self.parts = config, parameters, target_ids, parts
        self.rope: Rope = make_rope(
            head_dim=config.head_dim, theta=config.rope_theta, max_positions=max_positions, scaling=config.rope_scaling
        )
        self.draft_ids = draft_ids_of(target_ids, config.vocab_size)

    def head(self, target: TargetIdentity | None = None, card: dict[str, Any] | None = None) -> Head:
        """The current weights as a head that can be saved."""
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        return Head(config=self.config, tensors=tensors, target_ids=self.target_ids, target=target, card=card or {})

    def save(self, folder: Path, identity: TargetIdentity | None, card: Mapping[str, Any]) -> None:
        """Writes the head, int8. Raises ConfigError when the folder cannot be written."""
        save_head(folder, self.head(identity, dict(card)), int8=True)

    def about(self) -> str:
        """One sentence of its card on what it is made of."""
        layers = ", ".join(map(str, self.config.fused_layers))
        return f"draft vocabulary {self.config.draft_vocab_size}; reads the inputs of layers {layers}."

    def steps(self, examples: Sequence[Example], num_steps: int, *, rank: int = 0) -> list[StepScores]:
        """All training-time-test steps over a packed batch. ``rank``: how many best draft ids to return per row."""
        packed = Packed(examples)
        w, eps = self.parameters, self.config.rms_norm_eps
        features = F.linear(packed.captured, w["fc.weight"])
        q, k, v = self._qkv(packed.next_ids, features, packed.positions)
        keys = Keys(k, v)
        x, q = features[packed.query], q[packed.query]
        alive = torch.arange(len(packed.query))  # queries of the last step that take part in this one
        teacher_p = teacher(packed, self.parts)
        scores = []
        for step in range(num_steps):
            if step:
                alive = packed.alive(step)
                position = alive_in(packed.alive(step - 1), alive)
                rows = packed.query[alive]
                x = x[position]
                q, k, v = self._qkv(packed.ids_after(rows, step), x, packed.positions[rows] + step)
                keys.extend(k, v, alive, len(packed.query))
            x = x + F.linear(self._attend(q, keys, packed, alive), w["midlayer.self_attn.o_proj.weight"])
            x = x + self._mlp(rms(x, w["midlayer.post_attention_layernorm.weight"], eps))
            normed = rms(x, w["norm.weight"], eps)
            scores.append(score(
                normed, w["lm_head.weight"], packed, packed.query[alive], step, teacher_p=teacher_p,
                draft_ids=self.draft_ids, rank=rank,
            ))  # fmt: skip
        return scores

    def loss(self, examples: Sequence[Example], num_steps: int) -> tuple[torch.Tensor, list[StepScores]]:
        """Σ_j 0.8^j loss_j / Σ_j 0.8^j, and the steps."""
        scores = self.steps(examples, num_steps)
        return weighted(scores, DECAY), scores

    def _qkv(self, ids: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w, eps, config = self.parameters, self.config.rms_norm_eps, self.config
        embedded = rms(self.parts.embedding[ids], w["midlayer.input_layernorm.weight"], eps)
        x = torch.cat((embedded, rms(features, w["midlayer.hidden_norm.weight"], eps)), 1)
        fused = torch.cat([w[f"midlayer.self_attn.{letter}_proj.weight"] for letter in "qkv"])
        heads = F.linear(x, fused).unflatten(1, (-1, config.head_dim))
        cos, sin = self.rope.cos[positions][:, None], self.rope.sin[positions][:, None]
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), 1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _attend(self, q: torch.Tensor, keys: Keys, packed: Packed, alive: torch.Tensor) -> torch.Tensor:
        """[M, Hq*D]: each sequence on its own; own rows of later steps enter as single columns."""
        config, out = self.config, []
        groups = config.num_heads // config.num_kv_heads
        q = (q / math.sqrt(config.head_dim)).unflatten(1, (config.num_kv_heads, groups))  # [M, G, g, D]
        own_k = [k[alive] for k in keys.own_k]
        own_v = [v[alive] for v in keys.own_v]
        own = [torch.einsum("mhgd,mhd->hgm", q, k) for k in own_k]
        start = 0
        for sequence, count in enumerate(packed.counts(alive)):
            stop = start + count
            first, last = packed.bounds[sequence], packed.bounds[sequence + 1]
            k, v = keys.k[first:last], keys.v[first:last]
            scores = torch.einsum("mhgd,nhd->hgmn", q[start:stop], k)
            rows = packed.query[alive[start:stop]] - first
            scores = scores.masked_fill(torch.arange(last - first)[None] > rows[:, None], -math.inf)
            extra = [s[:, :, start:stop, None] for s in own]
            p = torch.cat([scores, *extra], -1).softmax(-1)
            mixed = torch.einsum("hgmn,nhd->mhgd", p[..., : last - first], v)
            for j, value in enumerate(own_v):
                mixed = mixed + torch.einsum("hgm,mhd->mhgd", p[..., last - first + j], value[start:stop])
            out.append(mixed.flatten(1))
            start = stop
        return torch.cat(out)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        w = self.parameters
        gate = F.linear(x, w["midlayer.mlp.gate_proj.weight"])
        return F.linear(
            F.silu(gate) * F.linear(x, w["midlayer.mlp.up_proj.weight"]), w["midlayer.mlp.down_proj.weight"]
        )
