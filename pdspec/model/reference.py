"""The same weights in transformers, for parity checks. Needs the ``transformers`` package."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pdspec.model.loader import ModelFiles, load_weights, torch_dtype


def reference_model(files: ModelFiles, dtype: str = "float32") -> Any:
    """A transformers causal language model in evaluation mode, on the CPU, with the tensors of ``files``."""
    if files.path is not None:
        return AutoModelForCausalLM.from_pretrained(files.path, dtype=torch_dtype(dtype)).eval()
    config = files.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_context,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=config.bos_ids[0],
            eos_token_id=config.eos_ids[0],
            pad_token_id=None,
        )
    )
    model.load_state_dict(load_weights(files, "float32"))
    if dtype != "float32":
        model = model.to(torch_dtype(dtype))
    return model.eval()
