"""``numerics: exact`` is proven at start-up, refused where it does not hold, and never claimed by torch operations."""

from __future__ import annotations

import pytest
import torch

from pdspec.config import WorkerConfig
from pdspec.engine import resources as engine_resources
from pdspec.engine.local import LocalGenerator
from pdspec.engine.selftest import check_exact, first_difference
from pdspec.errors import ConfigError
from pdspec.model.native import NativeOps
from pdspec.model.ops import TorchOps
from pdspec.types import GenerateRequest, SamplingParams

TINY = {"model": "tiny", "drafter": "none", "drafters": ("none", "ngram"), "cache_tokens": 1024, "threads": 1}


def test_the_kernels_prove_exact():
    resources = engine_resources.load(WorkerConfig(**TINY, numerics="exact"))
    assert resources.fingerprint["numerics"].startswith("exact/") and resources.metrics["numerics_exact"] == 1.0
    resources.pool.check_integrity([])
    resources.close()


def test_torch_operations_serve_without_a_compiler_and_say_fast(monkeypatch, caplog):
    monkeypatch.setattr(engine_resources, "make_ops", lambda device, threads: TorchOps(torch.device("cpu")))
    resources = engine_resources.load(WorkerConfig(**TINY))
    assert resources.fingerprint["numerics"] == "fast" and resources.metrics["native_kernels"] == 0.0
    assert "numerics: fast" in caplog.text
    generator = LocalGenerator(resources=resources)
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    answers = []
    for name in ("none", "ngram"):
        request = GenerateRequest(request_id="r", prompt_ids=tuple(range(30)), drafter=name, sampling=params)
        answers.append([token for chunk in generator.generate(request) for token in chunk.token_ids])
    assert len(answers[0]) == 12 and answers[0] == answers[1]
    with pytest.raises(ConfigError, match="numerics"):
        check_exact(resources, "exact")


def test_kernels_that_depend_on_the_batch_are_found_out(monkeypatch):
    resources = engine_resources.load(WorkerConfig(**TINY))
    real = NativeOps.linear

    def sloppy(self, x, *args, **kwargs):
        y = real(self, x, *args, **kwargs)
        return y.add_(1e-6 * len(x)) if kwargs.get("out") is None else y

    monkeypatch.setattr(NativeOps, "linear", sloppy)
    assert "differs" in first_difference(resources)
    resources.close()
