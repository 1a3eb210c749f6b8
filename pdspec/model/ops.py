"""The operations that targets and draft heads are made of, for CPU kernels and for plain torch.

Activations are float32 [R, *] tensors; weights are packed once. ``NativeOps`` (native.py) is row-invariant by
construction; ``TorchOps`` runs anywhere torch runs and promises equality only up to rounding.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch
from pdspec.model.build import NoCompiler
from pdspec.model.variants import Moe
from pdspec.model.yarn import attention_factor, stretch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rope:
    """cos and sin of every position, [max_positions, D/2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [R, D/2] at positions [R]."""
        rows = torch.from_numpy(positions.astype(np.int64)).to(self.cos.device)
        return self.cos[rows], self.sin[rows]


def make_rope(
    *,
    head_dim: int,
    theta: float,
    max_positions: int,
    scaling: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Rope:
    """Rotary tables (Su et al., 2104.09864), half-split form; ``scaling`` as in Hugging Face configs
    (``linear``, ``llama3`` or ``yarn``). Computed in float64."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind, factor = (scaling or {}).get("rope_type", "default"), 1.0
    if scaling and kind == "linear":
        inverse = inverse / float(scaling["factor"])
    elif scaling and kind == "llama3":
        inverse = _llama3(inverse, scaling)
    elif scaling and kind == "yarn":
        inverse, factor = stretch(inverse, theta, scaling), attention_factor(scaling)
    elif kind != "default":
        raise ConfigError(f"RoPE rule {kind!r} is unknown", field="rope_scaling", remedy="use linear, llama3 or yarn")
    angle = torch.arange(max_positions, dtype=torch.float64)[:, None] * inverse
    cos, sin = (factor * angle.cos()).float(), (factor * angle.sin()).float()
    return Rope(cos.contiguous().to(device), sin.contiguous().to(device))


def _llama3(inverse: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return inverse * smooth + inverse / factor * (1 - smooth)


HeadNorms = tuple[torch.Tensor, torch.Tensor, float]  # RMS norms of queries and of keys [D] each, and their epsilon


class Ops(Protocol):
    """What a model file may call. Shapes as in ``NativeOps``, which documents each."""

    name: str
    device: torch.device

    def pack(self, weight: torch.Tensor) -> Any: ...
    def linear(
        self,
        x: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        add: bool = False,
    ) -> torch.Tensor: ...
    def embed(self, weight: Any, ids: np.ndarray) -> torch.Tensor: ...
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...
    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...
    def rope_store(
        self, qkv: torch.Tensor, rope: Rope, batch: ForwardBatch, layer_cache: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor: ...
    def attend(self, q: torch.Tensor, batch: ForwardBatch, layer_cache: torch.Tensor) -> torch.Tensor: ...
    def pack_heads(self, weight: torch.Tensor) -> Any: ...
    def per_head(self, x: torch.Tensor, weight: Any) -> torch.Tensor: ...
    def route(
        self, logits: torch.Tensor, moe: Moe, bias: torch.Tensor | None
    ) -> tuple[np.ndarray, torch.Tensor]: ...
    def close(self) -> None: ...


def make_ops(device: str = "auto", threads: int = 0) -> Ops:
    """The operations for ``device`` ("auto": a GPU when there is one). Without a C compiler the CPU falls back to
    torch, says so once and reports ``name == "torch"``, which Status shows as metric ``native_kernels 0``."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        return TorchOps(torch.device(device))
    threads = threads or len(os.sched_getaffinity(0))
    try:
        from pdspec.model.native import NativeOps

        ops = NativeOps(threads)
        torch.set_num_threads(1)  # torch's own spinning threads would fight with ours
        return ops
    except NoCompiler as error:
        log.warning("CPU kernels are off: %s; running on torch operations, several times slower", error)
        torch.set_num_threads(threads)
        return TorchOps(torch.device("cpu"))


class TorchOps:
    """Plain torch: the fallback, the GPU path, and the reference that the kernels are tested against."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def close(self) -> None:
        """Nothing to stop."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device).contiguous()

    def linear(
        self,
        x: torch.Tensor,
        weight: Any,
        bias: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        add: bool = False,
    ) -> torch.Tensor:
        y = torch.nn.functional.linear(x.to(weight.dtype), weight).float()
        if bias is not None:
            y = y + bias
        if out is None:
            return y
        return out.add_(y) if add else out.copy_(y)

    def embed(self, weight: Any, ids: np.ndarray) -> torch.Tensor:
        return weight[torch.from_numpy(np.asarray(ids, np.int64)).to(self.device)].float()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def rope_store(
        self, qkv: torch.Tensor, rope: Rope, batch: ForwardBatch, layer_cache: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        _, page_size, _, heads, dim = layer_cache.shape
        q_heads = qkv.shape[1] // dim - 2 * heads
        q, k, v = qkv.unflatten(1, (-1, dim)).split((q_heads, heads, heads), 1)
        if norms is not None:
            q, k = self.rms_norm(q, norms[0], norms[2]), self.rms_norm(k, norms[1], norms[2])
        cos, sin = (table[:, None] for table in rope.at(batch.positions))
        rows = torch.from_numpy(_flat_rows(batch, batch.slots[:, None], page_size)[:, 0]).to(self.device)
        flat = layer_cache.flatten(0, 1)
        flat[rows, 0] = rotate(k, cos, sin).to(flat.dtype)
        flat[rows, 1] = v.to(flat.dtype)
        return rotate(q, cos, sin)

    def attend(self, q: torch.Tensor, batch: ForwardBatch, layer_cache: torch.Tensor) -> torch.Tensor:
        _, page_size, _, heads, dim = layer_cache.shape
        flat, group = layer_cache.flatten(0, 1), q.shape[1] // heads
        slots, seen = _visible(batch)
        keys = torch.from_numpy(_flat_rows(batch, slots, page_size)).to(self.device)
        parts = flat[keys].float()  # [R, keys, k|v, heads, dim]
        k, v = parts[:, :, 0], parts[:, :, -1]  # latent KV is both
        q_RHGD = (q / math.sqrt(dim)).unflatten(1, (heads, group))
        scores = torch.einsum("rhgd,rkhd->rhgk", q_RHGD, k)
        hidden = torch.from_numpy(~seen).to(self.device)[:, None, None, :]
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("rhgk,rkhd->rhgd", p, v.masked_fill(hidden[:, 0, 0, :, None, None], 0)).flatten(1)

    def pack_heads(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device).contiguous()

    def per_head(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        return torch.einsum("rhk,hnk->rhn", x.to(weight.dtype), weight).float()

    def route(self, logits: torch.Tensor, moe: Moe, bias: torch.Tensor | None) -> tuple[np.ndarray, torch.Tensor]:
        scores = logits.sigmoid() if moe.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores if bias is None else scores + bias
        if moe.groups > 1:
            groups = choice.unflatten(1, (moe.groups, -1))
            best = groups.topk(2).values.sum(-1).topk(moe.groups_per_token).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = groups.masked_fill(~kept[..., None], -math.inf).flatten(1)
        ids = choice.topk(moe.experts_per_token).indices
        weights = scores.gather(1, ids)
        if moe.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids.cpu().numpy(), weights * moe.scaling


def store_latent(rows: torch.Tensor, batch: ForwardBatch, layer_cache: torch.Tensor) -> None:
    """Latent KV [R, D] into the slots of its rows; ``layer_cache`` [pages, page_size, 1, 1, D]."""
    slots = torch.from_numpy(_flat_rows(batch, batch.slots[:, None], layer_cache.shape[1])[:, 0]).to(rows.device)
    layer_cache.flatten(0, 1)[slots, 0, 0] = rows.to(layer_cache.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [..., D], half-split form; cos and sin [..., D/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _visible(batch: ForwardBatch) -> tuple[np.ndarray, np.ndarray]:
    """Key slots [R, K] in visiting order (prefix, then ancestors) and which of them a row sees."""
    longest = int(batch.prefix_len.max()) if batch.num_rows else 0
    prefix = np.broadcast_to(np.arange(longest, dtype=np.int32), (batch.num_rows, longest))
    seen = np.concatenate((prefix < batch.prefix_len[:, None], batch.ancestors >= 0), axis=1)
    slots = np.concatenate((prefix, batch.ancestors), axis=1)
    return np.where(seen, slots, 0), seen


def _flat_rows(batch: ForwardBatch, slots: np.ndarray, page_size: int) -> np.ndarray:
    """Flat cache rows of slots [R, K] → int64 [R, K]."""
    pages = np.take_along_axis(batch.page_table[batch.sequence], slots // page_size, axis=1)
    return pages.astype(np.int64) * page_size + slots % page_size
