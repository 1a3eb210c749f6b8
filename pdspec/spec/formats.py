"""Whose draft heads can be read, and how their keys and settings become ours: one table for all families. No torch.

A format is recognised by ``config.json`` alone. Its rules rename the beginnings of keys; ``#`` is a module's number.
Our own keys are SafeAILab's for EAGLE, FasterDecoding's for Medusa and DeepSeek's for MTP, where module m of a target
of L layers is layer L+m-1. ``settings`` brings other configs under the keys that the families' ``parse_head`` reads.
What a format has no place for is refused by name, in ``stored.py``. ``docs/checkpoints.md`` tells users of it.

Key names and configs: SafeAILab/EAGLE (cnets.py, cnets1.py), sgl-project/SpecForge, vllm-project/speculators,
FasterDecoding/Medusa, XiaomiMiMo/MiMo, and transformers' DeepSeek-V3 and Qwen3-Next with vLLM's modules for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError, ConfigError
from pdspec.spec.heads import HEAD_REMEDY

Values = Mapping[str, Any]
WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
_MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_TABLES = r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"


def _same(values: Values) -> dict[str, Any]:
    return dict(values)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table. ``ignored`` keys (expressions) repeat something of the target or can be computed.

    ``inside``: the modules stand under such keys in a target's checkpoint, of which nothing else is read;
    ``counts_on``: their numbers go on from the target's layers, else from 0. ``hidden_first``: the input projection
    reads the hidden state before the embedding; ours reads it behind.
    """

    name: str
    family: str
    recognised: Callable[[Values], bool]
    files: tuple[str, ...] = (WEIGHTS, PICKLED)
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    settings: Callable[[Values], dict[str, Any]] = _same
    inside: str = ""
    counts_on: bool = True
    hidden_first: bool = False

    def ours(self, key: str, first: int) -> str:
        """Our name of a stored key; ``first``: layers of the target, after which modules are counted."""
        for theirs, ours in self.renames:
            pattern = re.escape(theirs).replace(re.escape("#"), r"(\d+)")
            if found := re.match(pattern, key):
                number = int(found[1]) if "#" in theirs else 0
                return ours.replace("#", str(number + (0 if self.counts_on else first))) + key[found.end() :]
        return key

    def theirs(self, name: str, first: int) -> str:
        """What ``ours`` makes ``name`` of, to be spoken of: the first such key."""
        for theirs, ours in self.renames:
            if not ours:
                continue
            pattern = re.escape(ours).replace(re.escape("#"), r"(\d+)")
            if found := re.match(pattern, name):
                number = int(found[1]) - (0 if self.counts_on else first) if "#" in ours else 0
                if "#" in theirs or number == 0:
                    return theirs.replace("#", str(number)) + name[found.end() :]
        return name

    def ignores(self, key: str) -> bool:
        """Whether a stored key is left where it is."""
        return any(re.fullmatch(pattern, key) for pattern in (*self.ignored, _TABLES))

    def takes(self, key: str, first: int) -> bool:
        """Whether a stored key is read at all."""
        if self.ignores(key) or not key.startswith(self.inside):
            return False
        layer = re.match(r"model\.layers\.(\d+)\.", self.ours(key, first))
        return not self.inside or layer is None or int(layer[1]) >= first


def _nested(values: Values) -> dict[str, Any]:
    """A speculators config: the layer's is inside."""
    return {**values, **values["transformer_layer_config"]}


def _attention(values: Values) -> dict[str, Any]:
    """What a layer's ``model_type`` says of its attention."""
    kind, found = str(values.get("model_type", "")), dict(values)
    if kind in ("qwen2", "mimo"):  # biases of q, k and v alone
        found |= {"qkv_bias": kind == "qwen2" or bool(found.get("attention_bias")), "attention_bias": False}
    elif kind == "qwen3":
        found["qk_norm"] = True
    elif kind.startswith(("qwen3_next", "qwen3_5")):
        rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
        # of one axis, as text is, M-RoPE is RoPE
        rope = {k: v for k, v in rope.items() if not k.startswith("mrope") and (k, v) not in _M_ROPE}
        found |= {"qk_norm": True, "output_gate": bool(found.get("attn_output_gate", True)), "rope_scaling": None,
                  "zero_centred_norms": True,
                  "rope_parameters": {"partial_rotary_factor": found.get("partial_rotary_factor", 0.25), **rope}}
    return found


_M_ROPE = (("type", "mrope"), ("rope_type", "mrope"))


def _eagle(values: Values) -> dict[str, Any]:
    if values.get("layernorms"):
        raise ConfigError("layernorms of a speculators EAGLE head cannot be run", field="heads",
                          remedy="choose a head without layernorms")
    return {**_attention(_nested(values)), "bias": bool(values.get("fusion_bias"))}


def _eagle3(values: Values) -> dict[str, Any]:
    """Layer ids are as vLLM has them: inputs of these layers."""
    if values.get("norm_before_residual") is None:
        raise ConfigError("config.json lacks norm_before_residual, for which engines have other defaults",
                          field="heads", remedy="set it as the head was trained")
    return {**_attention(_nested(values)), "fused_layers": values.get("eagle_aux_hidden_state_layer_ids")}


def _specforge(values: Values) -> dict[str, Any]:
    """Layer ids in ``eagle_config`` are as SGLang has them, outputs of these layers; beside it as vLLM has them."""
    more = dict(values.get("eagle_config") or {})
    outputs, inputs = (one.get("eagle_aux_hidden_state_layer_ids") for one in (more, values))
    fused = [int(layer) + 1 for layer in outputs] if outputs else inputs
    if inputs and fused != list(inputs):
        raise ConfigError(f"eagle_aux_hidden_state_layer_ids are {inputs} as inputs (vLLM) and {fused} by eagle_config",
                          field="heads", remedy="leave the wrong ones out of config.json")
    return {**values, **more, "fused_layers": fused}


def _ours(values: Values) -> dict[str, Any]:
    return {**values, **(values.get("eagle_config") or {}), "fused_layers": values["pdspec"].get("fused_layers")}


def _text(values: Values) -> dict[str, Any]:
    """A config of text alone, or with pictures beside."""
    return _attention({**values, **(values.get("text_config") or {})})


def _qwen(values: Values) -> dict[str, Any]:
    found = _text(values)
    count = found.get("mtp_num_hidden_layers") or found.get("num_nextn_predict_layers") or 1
    return {**found, "num_nextn_predict_layers": count}


def _speculators_mtp(values: Values) -> dict[str, Any]:
    """The layer's config is the target's, and so is its number of layers."""
    return {**_attention(_nested(values)), "num_nextn_predict_layers": values.get("num_nextn_predict_layers", 1)}


def _speculators(kind: str) -> Callable[[Values], bool]:
    return lambda values: values.get("speculators_model_type") == kind


def _qwen_next(values: Values) -> bool:
    return str((values.get("text_config") or values).get("model_type", "")).startswith(("qwen3_next", "qwen3_5"))


def _made_here(values: Values) -> bool:
    return bool(values.get("pdspec"))


def _plain(values: Values) -> bool:
    """A Llama config of one layer with nothing beside it that says whose it is."""
    others = ("speculators_model_type", "medusa_num_heads", "num_nextn_predict_layers", "pdspec")
    return "hidden_size" in values and not any(values.get(name) for name in others)


_MIDLAYER = ("layers.0.", "midlayer.")
_EAGLE3 = (("midlayer.", "midlayer."), _MIDLAYER)
_MTP_NAMES = (("token_layernorm.", "enorm."), ("hidden_layernorm.", "hnorm."), ("input_proj.", "eh_proj."),
              ("final_layernorm.", "shared_head.norm."), ("", ""))  # fmt: skip
_QWEN = (("mtp.fc.", "model.layers.#.eh_proj."), ("mtp.pre_fc_norm_embedding.", "model.layers.#.enorm."),
         ("mtp.pre_fc_norm_hidden.", "model.layers.#.hnorm."), ("mtp.norm.", "model.layers.#.shared_head.norm."),
         ("mtp.layers.#.", "model.layers.#."))  # fmt: skip


def _modules(prefix: str) -> tuple[tuple[str, str], ...]:
    return tuple((prefix + theirs, "model.layers.#." + ours) for theirs, ours in _MTP_NAMES)


FORMATS = (
    *(Format(name="pdspec", family=family, recognised=_made_here, settings=_ours)
      for family in ("eagle1", "medusa", "mtp")),
    Format(name="pdspec", family="eagle3", recognised=_made_here, settings=_ours, renames=_EAGLE3),
    Format(
        name="speculators eagle", family="eagle1", recognised=_speculators("eagle"), settings=_eagle,
        renames=(("fusion_fc.", "fc."), ("transformer.", "layers.0.")), ignored=(r"lm_head\.weight",),
    ),
    Format(name="SafeAILab EAGLE-1, EAGLE-2", family="eagle1", recognised=_plain),
    Format(
        name="speculators eagle3", family="eagle3", recognised=_speculators("eagle3"), settings=_eagle3,
        renames=(_MIDLAYER,), ignored=(r"verifier_(lm_head|norm)\.weight",),
    ),
    Format(name="SafeAILab EAGLE-3, SpecForge", family="eagle3", recognised=_plain, settings=_specforge,
           renames=_EAGLE3),
    Format(
        name="Medusa", family="medusa", files=(*_MEDUSA_FILES, WEIGHTS), renames=(("medusa_head.", ""),),
        recognised=lambda values: bool(values.get("medusa_num_heads")),
    ),
    Format(
        name="speculators mtp", family="mtp", recognised=_speculators("mtp"), settings=_speculators_mtp,
        renames=_modules("mtp_layers.#."), counts_on=False, ignored=(r"(embed_tokens|lm_head)\.weight",),
    ),
    Format(
        name="MiMo", family="mtp", recognised=lambda values: values.get("model_type") == "mimo", settings=_text,
        renames=_modules("model.mtp_layers.#."), inside="model.mtp_layers.", counts_on=False, hidden_first=True,
    ),
    Format(
        name="Qwen3-Next, Qwen3.5", family="mtp", recognised=_qwen_next, settings=_qwen, renames=_QWEN,
        inside="mtp.", counts_on=False,
    ),
    Format(
        name="DeepSeek-V3", family="mtp", settings=_text, inside="model.layers.",
        recognised=lambda values: bool(values.get("num_nextn_predict_layers")),
    ),
)


def readable(family: str) -> tuple[str, ...]:
    """Names of the formats of a family's heads."""
    return tuple(row.name for row in FORMATS if row.family == family)


def recognise(values: Values, family: str, where: Path | str) -> Format:
    """The format of a head of ``family`` whose ``config.json`` has ``values``. Raises CheckpointError naming what it is
    instead."""
    fitting = [row for row in FORMATS if row.recognised(values)]
    for row in fitting:
        if row.family == family:
            return row
    found = f"is a {fitting[0].name} checkpoint, for heads.{fitting[0].family}" if fitting else "is none that is known"
    raise CheckpointError(f"the head in {where} {found}; {family} reads {', '.join(readable(family))}",
                          field=f"heads.{family}", remedy=HEAD_REMEDY)


def settings(values: Values, family: str, where: Path | str) -> dict[str, Any]:
    """``values`` under our keys. Raises as ``recognise``, and CheckpointError or ConfigError naming the file for a
    config that lacks something or asks for what cannot be run."""
    row = recognise(values, family, where)
    try:
        return row.settings(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", field=error.field, remedy=error.remedy) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json of the head in {where} is damaged: {error!r}", field="heads",
                              remedy=HEAD_REMEDY) from error
