"""What drafts of each family cost on a roofline: weights, forwards, KV, and what crosses the handoff for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pdspec.errors import ConfigError
from pdspec.spec.registry import family
from pdspec.study.plan.roofline import Roofline
from pdspec.study.plan.shapes import KNOWN, Shape, model_shape

# One alpha for chains of each family where none is given or measured: what published greedy acceptance lengths on
# MT-bench come to. Only a start; `pdspec plan calibrate` measures a deployment's own.
TYPICAL_ALPHA = {
    "none": 0.0, "ngram": 0.30, "suffix": 0.35, "lookahead": 0.35, "medusa": 0.60, "eagle1": 0.72, "eagle2": 0.72,
    "eagle3": 0.80, "mtp": 0.80, "draft_model": 0.70, "sparse": 0.90, "combined": 0.80,
}  # fmt: skip
_DRAFT_VOCAB = 32000  # of an EAGLE-3 head
_SPARSE_ROWS = 512  # of its own KV that a sparse drafter reads


@dataclass(frozen=True, kw_only=True)
class DraftCost:
    """A family on one machine. ``shared`` is what its head reads of the target's own weights, which take no memory of
    their own; bytes, seconds."""

    name: str
    weight_bytes: float  # of its own: the memory it adds, its KV apart
    kv_bytes: float  # of one token
    hidden_bytes: float  # of one prompt token, where the decode worker runs the drafter's prefill
    forward_s: float  # of one draft forward
    forwards: bool  # one for each depth; otherwise one for all of them
    prefill_flops: float  # of one prompt token

    def draft_s(self, depth: int) -> float:
        """Of drafts ``depth`` deep."""
        return self.forward_s * (depth if self.forwards else min(1, depth))


def draft_cost(name: str, target: Roofline, *, batch: int = 1, context: float = 0.0) -> DraftCost:
    """``name``: a family, or a decoder that drafts (a known one, or a folder). Raises ConfigError and UnknownName."""
    if name in KNOWN or name not in TYPICAL_ALPHA:
        return _model(name, target, batch, context)
    family(name)
    if name in ("none", "ngram", "suffix"):
        return _free(name)
    if name == "draft_model":
        raise ConfigError("which model drafts?", field="--drafter", remedy="name it: " + ", ".join(KNOWN))
    shape, hidden = target.shape, target.shape.config.hidden_size
    if name == "lookahead":  # its rows ride along in the verification
        return _free(name)
    if name == "sparse":
        seconds = target.forward_s(batch, batch * min(context, _SPARSE_ROWS), min(context, _SPARSE_ROWS))
        return replace(_free(name), forward_s=seconds, forwards=True)
    if name == "medusa":
        own = 4 * (hidden * hidden + shape.head_weights)
        return _head(name, target, own=own, shared=0.0, kv_bytes=0.0, hidden_rows=0, batch=batch, context=context,
                     forwards=False)  # fmt: skip
    layer = shape.with_layers(1)
    moe = layer.config.moe if name == "mtp" else None
    dense = layer if moe else replace(layer, config=replace(layer.config, moe=None))
    one = dense.weights - (1 if dense.config.tie_embeddings else 2) * shape.head_weights - hidden
    fused, vocabulary = {"eagle3": (3, _DRAFT_VOCAB), "combined": (3, _DRAFT_VOCAB)}.get(name, (2, 0))
    own = one + fused * hidden * hidden + vocabulary * hidden
    shared = 0.0 if vocabulary else shape.head_weights
    return _head(name, target, own=own, shared=shared, kv_bytes=dense.kv_bytes,
                 hidden_rows=3 if fused == 3 else 1, batch=batch, context=context, forwards=True)  # fmt: skip


def _free(name: str) -> DraftCost:
    return DraftCost(
        name=name, weight_bytes=0.0, kv_bytes=0.0, hidden_bytes=0.0, forward_s=0.0, forwards=False, prefill_flops=0.0
    )


def _head(
    name: str, target: Roofline, *, own: float, shared: float, kv_bytes: float, hidden_rows: int, batch: int,
    context: float, forwards: bool,
) -> DraftCost:  # fmt: skip
    size, hardware = target.shape.weight_size, target.hardware
    read = ((own + shared) * size + batch * context * kv_bytes) / target.devices  # split like the target
    compute = 2.0 * batch * (own + shared) / hardware.compute / target.devices
    return DraftCost(
        name=name, weight_bytes=own * size, kv_bytes=kv_bytes,
        hidden_bytes=hidden_rows * target.shape.config.hidden_size * 4.0,  # float32 on the wire
        forward_s=max(read / hardware.read, compute) + _launches(target), forwards=forwards, prefill_flops=2.0 * own,
    )  # fmt: skip


def _launches(target: Roofline) -> float:
    """A head's forward is launched from within the step: a third of a whole forward's overhead."""
    return target.hardware.forward_s / 3


def _model(name: str, target: Roofline, batch: int, context: float) -> DraftCost:
    shape = Shape(config=model_shape(name), dtype=target.shape.dtype, kv_dtype=target.shape.kv_dtype)
    if shape.config.vocab_size != target.shape.config.vocab_size:
        message = f"its vocabulary of {shape.config.vocab_size} is not {target.shape.config.vocab_size}, the target's"
        raise ConfigError(f"{name} cannot draft: {message}", field="--drafter", remedy="name one of the same tokenizer")
    draft = Roofline(hardware=target.hardware, shape=shape)
    return DraftCost(
        name=name, weight_bytes=shape.weight_bytes, kv_bytes=shape.kv_bytes, hidden_bytes=0.0,
        forward_s=draft.forward_s(batch, batch * context, context), forwards=True,
        prefill_flops=2.0 * shape.active_weights,
    )  # fmt: skip
