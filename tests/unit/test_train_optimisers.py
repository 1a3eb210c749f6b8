"""Muon and AdamW as one optimiser: which weights each moves, and how far."""

import pytest
import torch

from pdspec.errors import ConfigError
from pdspec.train.config import TrainConfig
from pdspec.train.optimisers import Optimisers


def weights() -> dict[str, torch.nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    shapes = {"fc.weight": (24, 40), "norm.weight": (24,), "lm_head.weight": (60, 24)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=made)) for name, shape in shapes.items()}


def test_muon_takes_hidden_matrices_alone() -> None:
    parameters = weights()
    adamw, muon = Optimisers("muon", parameters, 1e-3).members
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(parameters["fc.weight"])]
    assert sum(len(g["params"]) for g in adamw.param_groups) == 2
    assert len(Optimisers("adamw", parameters, 1e-3).members) == 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_first_step_is_as_long_for_both(kind: str) -> None:
    """AdamW's first step is the learning rate per weight; Muon's is scaled to the root mean square 0.2 of AdamW's
    later ones."""
    parameters = weights()
    before = {name: value.detach().clone() for name, value in parameters.items()}
    joint = Optimisers(kind, parameters, 1e-2)
    sum((value**2).sum() for value in parameters.values()).backward()  # type: ignore[union-attr]
    joint.step()
    moved = {name: float((parameters[name].detach() - before[name]).square().mean().sqrt()) for name in before}
    assert moved["norm.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["lm_head.weight"] == pytest.approx(1e-2, rel=1e-3)
    wanted = (0.6e-3, 2.4e-3) if kind == "muon" else (0.99e-2, 1.01e-2)
    assert wanted[0] < moved["fc.weight"] < wanted[1]
    joint.zero_grad()
    assert all(value.grad is None for value in parameters.values())


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimiser"):
        TrainConfig(out="x", optimiser="sgd")  # type: ignore[arg-type]
