"""Mixed precision stays near float32, attention and losses have the gradients of their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from pdspec.errors import ConfigError
from pdspec.train.attention import Span, attend
from pdspec.train.divergence import LOSSES, divergence
from pdspec.train.precision import has_bfloat16_units, product, product_type, products_in

LOW = torch.bfloat16


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def test_auto_follows_the_processor() -> None:
    assert has_bfloat16_units("flags\t\t: fpu avx512_bf16 sse") and has_bfloat16_units("flags : amx_bf16")
    assert not has_bfloat16_units("flags\t\t: fpu avx2 f16c") and not has_bfloat16_units("")
    assert product_type("auto") == (LOW if has_bfloat16_units() else torch.float32)
    with pytest.raises(ConfigError, match="float16"):
        product_type("float16")


def test_a_product_rounds_its_operands_and_keeps_float32_around() -> None:
    x, weight, bias = draw(7, 33), draw(5, 33, seed=1), draw(5, seed=2)
    with products_in(LOW):
        low = product(x, weight, bias)
        found = gradients(low.square().sum(), x, weight)
    exact = product(x, weight, bias)
    wanted = gradients(exact.square().sum(), x, weight)
    assert low.dtype == torch.float32 and all(one.dtype == torch.float32 for one in found)
    assert not torch.equal(low, exact)
    for a, b in zip((low, *found), (exact, *wanted), strict=True):
        assert float((a.detach() - b.detach()).norm() / b.detach().norm()) < 0.02


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor, spans: list[Span]
) -> torch.Tensor:
    """Query by query, head by head."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for span in spans:
        for row in range(span.start, span.stop):
            last = span.first + span.seen + row - span.start
            for head in range(q.shape[1]):
                keys = torch.cat((k[span.first : last, head // group], own_k[:, row, head // group]))
                values = torch.cat((v[span.first : last, head // group], own_v[:, row, head // group]))
                p = (keys @ q[row, head] / math.sqrt(q.shape[2])).softmax(0)
                out = out.index_put((torch.tensor(row), torch.tensor(head)), p @ values)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("steps", [0, 2])
def test_attention_and_its_gradient_are_those_of_the_definition(dtype: torch.dtype, steps: int) -> None:
    spans = [Span(0, 3, 0, 6, 4), Span(3, 5, 6, 8, 1)]
    inputs = (draw(5, 4, 16), draw(8, 2, 16, seed=1), draw(8, 2, 16, seed=2),
              draw(steps, 5, 2, 16, seed=3), draw(steps, 5, 2, 16, seed=4))  # fmt: skip
    with products_in(dtype):
        found = attend(*inputs, spans)
    wanted = reference_attention(*inputs, spans)
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    pairs = zip(gradients((found * towards).sum(), *inputs), gradients((wanted * towards).sum(), *inputs), strict=True)
    for a, b in [(found, wanted), *pairs]:
        torch.testing.assert_close(a, b, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def plain_loss(kind: str, p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    log_q = logits.log_softmax(-1)
    if kind == "total-variation":
        return (p - log_q.exp()).abs().sum(-1) / 2
    cross = -(p * log_q).sum(-1)
    return cross + (p * p.log()).sum(-1) if kind == "kl" else cross


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_every_loss_and_its_gradient_are_those_of_the_definition(kind: str, dtype: torch.dtype) -> None:
    y, output = draw(150, 24), draw(40, 24, seed=1)
    teacher = draw(90, 40, seed=2).detach().softmax(-1)
    where = torch.arange(150) % 90
    weight = torch.rand(150, generator=torch.Generator().manual_seed(3))
    with products_in(dtype):
        loss, ranked = divergence(kind, y, output, teacher, where, weight, 3)
    logits = y @ output.T
    wanted = (weight * plain_loss(kind, teacher[where], logits)).sum()
    if dtype == torch.float32:
        assert torch.equal(ranked, logits.topk(3).indices)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=tolerance)
    for a, b in zip(gradients(2 * loss, y, output), gradients(2 * wanted, y, output), strict=True):
        assert float((a - b).norm() / b.norm()) < 3 * tolerance  # total variation: rounding may turn a sign
