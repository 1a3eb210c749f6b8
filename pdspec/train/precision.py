"""Mixed precision: float32 master weights, matrix products in bfloat16 where the machine has units for them.

Inside ``products_in(torch.bfloat16)`` the functions of this file round both operands of a product and accumulate in
float32; their gradients do the same. Whatever else a loss does (norms, softmax, sums) stays float32. The setting is
torch's own autocast state, so that it reaches custom gradients and is undone with the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pdspec.errors import ConfigError

PRECISIONS = ("auto", "float32", "bfloat16")
_CPU_FLAGS = ("avx512_bf16", "amx_bf16")


def has_bfloat16_units(cpuinfo: str | None = None) -> bool:
    """Whether this CPU multiplies bfloat16 in hardware. ``cpuinfo``: the text of /proc/cpuinfo. Elsewhere than on Linux
    nothing says so, and the answer is no."""
    path = Path("/proc/cpuinfo")
    if cpuinfo is None:
        cpuinfo = path.read_text(encoding="utf-8") if path.exists() else ""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return any(flag in flags for flag in _CPU_FLAGS)


def product_type(precision: str) -> torch.dtype:
    """What products are made in. ``auto``: bfloat16 where the hardware has it. Raises ConfigError for another name."""
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}", field="precision",
                          remedy="choose one of " + ", ".join(PRECISIONS))
    low = has_bfloat16_units() if precision == "auto" else precision == "bfloat16"
    return torch.bfloat16 if low else torch.float32


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Makes the products inside in ``dtype``."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


def current() -> torch.dtype:
    """What products are made in here."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ (+ bias), float32: [R, K] with [N, K] → [R, N]."""
    if current() == torch.float32:
        return F.linear(x, weight, bias)
    made: torch.Tensor = _Rounded.apply(x, weight)
    return made if bias is None else made + bias


def multiply(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.dtype = torch.float32
) -> torch.Tensor:
    """a b of matrices or stacks of them, as ``out``. Rounds what is not ``dtype`` yet."""
    with products_in(torch.float32):
        return torch.matmul(a.to(dtype), b.to(dtype)).to(out)


class _Rounded(torch.autograd.Function):
    """x Wᵀ with operands rounded to bfloat16, in both directions; the weight's gradient sums in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        low_x, low_w = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(low_x, low_w)
        return multiply(low_x, low_w.T, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (low_x, low_w), low = ctx.saved_tensors, grads[0].to(torch.bfloat16)
        grad_x = multiply(low, low_w, torch.bfloat16) if ctx.needs_input_grad[0] else None
        grad_w = multiply(low.T, low_x, torch.bfloat16) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w
