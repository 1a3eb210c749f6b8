"""Attention of one draft layer over its pages, spelled out with ``Ops``, with what published layers have beyond Llama's
(see ``geometry.LayerGeometry``).

    q, k, v = rows of x; biases; q and k normed head by head; RoPE on the first ``rotary_dim`` values of a head
    out     = softmax(q k^T / sqrt(D)) v · sigmoid(gate), the gate as x's other rows

RoPE of a part of a head needs no operation of its own: q's and k's values are put in another order, the same for both,
in which each turned pair stands as half-split RoPE has it and the pairs behind are turned by 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import DTYPES
from pdspec.model.batch import ForwardBatch
from pdspec.model.layers import sigmoid
from pdspec.model.ops import HeadNorms, Ops, Rope, make_rope
from pdspec.spec.geometry import LayerGeometry

Tensor = Callable[[str], torch.Tensor]  # by its name in the layer


@dataclass(frozen=True)
class Queries:
    """Of R rows: ``q`` [R, Hq, D] after RoPE, and the gates [R, Hq D] where the layer has them."""

    q: torch.Tensor
    gate: torch.Tensor | None = None

    def take(self, rows: torch.Tensor) -> Queries:
        """Of some of the rows."""
        return Queries(self.q[rows], None if self.gate is None else self.gate[rows])


def draft_rope(config: LayerGeometry, max_positions: int, device: torch.device) -> Rope:
    """Tables of ``config``'s RoPE, [max_positions, D/2]; pairs beyond ``rotary_dim`` are not turned."""
    rope = make_rope(head_dim=config.rotary_dim or config.head_dim, theta=config.rope_theta,
                     max_positions=max_positions, scaling=config.rope_scaling, device=device)
    rest = config.head_dim // 2 - rope.cos.shape[1]
    if rest == 0:
        return rope
    still = torch.ones(max_positions, rest, device=device)
    return Rope(torch.cat((rope.cos, still), 1), torch.cat((rope.sin, 0 * still), 1))


def paired(turned: list[tuple[int, int]], head_dim: int) -> torch.Tensor:
    """The order of a head's values in which the i-th of the ``turned`` pairs stands at (i, i + D/2)."""
    inside = {one for pair in turned for one in pair}
    rest = [one for one in range(head_dim) if one not in inside]
    half = head_dim // 2 - len(turned)
    firsts, seconds = [a for a, _ in turned], [b for _, b in turned]
    return torch.tensor([*firsts, *rest[:half], *seconds, *rest[half:]])


class Attention:
    """Packed weights. ``tensor`` gives those of the layer by name."""

    def __init__(
        self, config: LayerGeometry, tensor: Tensor, *, ops: Ops, dtype: str, pages: torch.Tensor, rope: Rope
    ) -> None:
        self._ops, self._config, self._pages, self._rope = ops, config, pages, rope
        half, dim = config.rotary_dim // 2, config.head_dim
        order = paired([(i, i + half) for i in range(half)], dim) if half else torch.arange(dim)
        parts = self._parts(tensor, "weight", order)
        gate = parts.pop("gate", None)
        self._qkv = ops.pack(torch.cat([*parts.values()]).to(DTYPES[dtype]))
        self._gate = None if gate is None else ops.pack(gate.to(DTYPES[dtype]))
        self._bias = self._gate_bias = None
        if config.qkv_bias:
            biases = self._parts(tensor, "bias", order)
            gate_bias = biases.pop("gate", None)
            self._bias = torch.cat([*biases.values()]).float().to(ops.device)
            self._gate_bias = None if gate_bias is None else gate_bias.float().to(ops.device)
        self._norms: HeadNorms | None = None
        if config.qk_norm:
            q, k = (tensor(f"self_attn.{n}_norm.weight")[order].float().to(ops.device) for n in "qk")
            self._norms = q, k, config.rms_norm_eps
        self._o = ops.pack(tensor("self_attn.o_proj.weight").to(DTYPES[dtype]))

    def over(self, pages: torch.Tensor) -> Attention:
        """The same weights over other pages."""
        other = copy.copy(self)
        other._pages = pages
        return other

    def _parts(self, tensor: Tensor, kind: str, order: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows of q, k, v and of the gate, in order of the kernels."""
        dim = self._config.head_dim
        heads = {n: tensor(f"self_attn.{n}_proj.{kind}") for n in "qkv"}
        q, found = heads["q"].unflatten(0, (self._config.num_heads, -1)), {}
        if self._config.output_gate:
            q, found["gate"] = q[:, :dim], q[:, dim:].flatten(0, 1)
        k = heads["k"].unflatten(0, (-1, dim))
        return {"q": q[:, order].flatten(0, 1), "k": k[:, order].flatten(0, 1), "v": heads["v"], **found}

    def store(self, x: torch.Tensor, batch: ForwardBatch) -> Queries:
        """Writes the KV rows of inputs [R, *] and returns their queries."""
        qkv = self._ops.linear(x, self._qkv, self._bias)
        gate = None if self._gate is None else self._ops.linear(x, self._gate, self._gate_bias)
        return Queries(self._ops.rope_store(qkv, self._rope, batch, self._pages, self._norms), gate)

    def attend(self, queries: Queries, batch: ForwardBatch) -> torch.Tensor:
        """[R, H]: what attention adds to these rows."""
        mixed = self._ops.attend(queries.q, batch, self._pages)
        if queries.gate is not None:
            mixed = mixed * sigmoid(queries.gate)
        return self._ops.linear(mixed, self._o)


class SwiGlu:
    """down(SiLU(gate x) · up x) of matrices ``{prefix}.gate_proj`` …"""

    def __init__(self, tensor: Tensor, prefix: str, *, ops: Ops, dtype: str) -> None:
        def pack(*names: str) -> Any:
            return ops.pack(torch.cat([tensor(f"{prefix}.{name}.weight") for name in names]).to(DTYPES[dtype]))

        self._ops, self._gate_up, self._down = ops, pack("gate_proj", "up_proj"), pack("down_proj")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H] of [R, H]."""
        return self._ops.linear(self._ops.silu_mul(self._ops.linear(x, self._gate_up)), self._down)


def row_index(outputs: np.ndarray, device: torch.device) -> torch.Tensor:
    """Row numbers as torch takes them."""
    return torch.from_numpy(outputs.astype(np.int64)).to(device)
