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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rope:
    """cos and sin of every position, [max_positions, D/2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor


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
    kind, gain = (scaling or {}).get("rope_type", "default"), 1.0
    if scaling and kind == "linear":
        inverse = inverse / float(scaling["factor"])
    elif scaling and kind == "llama3":
        inverse = _llama3(inverse, scaling)
    elif scaling and kind == "yarn":
        inverse, gain = _yarn(inverse, scaling, theta)
    elif kind != "default":
        raise ConfigError(f"RoPE rule {kind!r} is unknown", field="rope_scaling", remedy="use linear, llama3 or yarn")
    angle = torch.arange(max_positions, dtype=torch.float64)[:, None] * inverse
    cos, sin = (gain * angle.cos()).float(), (gain * angle.sin()).float()
    return Rope(cos.contiguous().to(device), sin.contiguous().to(device))


def _llama3(inverse: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return inverse * smooth + inverse / factor * (1 - smooth)


def _yarn(inverse: torch.Tensor, scaling: dict[str, Any], theta: float) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2309.00071): slow pairs are interpolated, fast ones kept, with a ramp between; and what cos
    and sin are multiplied by."""
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    pairs = len(inverse)

    def pair_of(rotations: float) -> float:
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(float(scaling.get("beta_fast") or 32)), pair_of(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = ((torch.arange(pairs, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    gain = scaling.get("attention_factor")
    if gain is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        gain = yarn_gain(factor, float(scaling["mscale"])) / yarn_gain(factor, float(scaling["mscale_all_dim"]))
    return inverse / factor * ramp + inverse * (1 - ramp), float(yarn_gain(factor, 1.0) if gain is None else gain)


def yarn_gain(factor: float, weight: float) -> float:
    """YaRN's attention temperature: 1 + 0.1 ``weight`` ln(factor)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def norm_heads(
    qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, kv_heads: int, eps: float
) -> torch.Tensor:
    """qkv [R, (Hq+2Hk) D] with each head of q and k normed over its D values (Qwen3)."""
    heads = qkv.unflatten(1, (-1, len(q_norm)))
    normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps)
    q, k = normed[:, : -2 * kv_heads] * q_norm, normed[:, -2 * kv_heads : -kv_heads] * k_norm
    return torch.cat((q, k, heads[:, -kv_heads:]), 1).flatten(1).contiguous()


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
        self, qkv: torch.Tensor, rope: Rope, batch: ForwardBatch, layer_cache: torch.Tensor
    ) -> torch.Tensor: ...
    def attend(self, q: torch.Tensor, batch: ForwardBatch, layer_cache: torch.Tensor) -> torch.Tensor: ...
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

    def rope_store(self, qkv: torch.Tensor, rope: Rope, batch: ForwardBatch, layer_cache: torch.Tensor) -> torch.Tensor:
        _, page_size, _, heads, dim = layer_cache.shape
        q_heads = qkv.shape[1] // dim - 2 * heads
        q, k, v = qkv.unflatten(1, (-1, dim)).split((q_heads, heads, heads), 1)
        positions = torch.from_numpy(batch.positions.astype(np.int64)).to(self.device)
        cos, sin = rope.cos[positions][:, None], rope.sin[positions][:, None]
        rows = torch.from_numpy(_flat_rows(batch, batch.slots[:, None], page_size)[:, 0]).to(self.device)
        flat = layer_cache.flatten(0, 1)
        flat[rows, 0] = _rotate(k, cos, sin).to(flat.dtype)
        flat[rows, 1] = v.to(flat.dtype)
        return _rotate(q, cos, sin)

    def attend(self, q: torch.Tensor, batch: ForwardBatch, layer_cache: torch.Tensor) -> torch.Tensor:
        _, page_size, _, heads, dim = layer_cache.shape
        flat, group = layer_cache.flatten(0, 1), q.shape[1] // heads
        slots, seen = _visible(batch)
        keys = torch.from_numpy(_flat_rows(batch, slots, page_size)).to(self.device)
        k, v = flat[keys].float().unbind(2)  # [R, keys, heads, dim]
        q_RHGD = (q / math.sqrt(dim)).unflatten(1, (heads, group))
        scores = torch.einsum("rhgd,rkhd->rhgk", q_RHGD, k)
        hidden = torch.from_numpy(~seen).to(self.device)[:, None, None, :]
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("rhgk,rkhd->rhgd", p, v.masked_fill(hidden[:, 0, 0, :, None, None], 0)).flatten(1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
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
