"""A random Llama over bytes, the same for the same seed: what tests serve when the weights do not matter. No torch.

Its logits must not be degenerate: the next token has to depend on the whole context, not on the last token alone.
So the head is not tied, every projection keeps its input's variance, and queries are sharp enough that attention is
far from uniform.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pdspec.model.config import ModelConfig, weight_shapes
from pdspec.model.gguf_convert import bpe_model, special_token
from pdspec.model.tensorfile import to_bfloat16

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 272  # 256 bytes, three specials, 13 ids that decode to nothing
QUERY_GAIN = 2.0  # scores of standard deviation ~4: attention picks a few rows
HEAD_GAIN = 2.0  # logits of standard deviation ~2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_config(name: str) -> ModelConfig:
    """The geometry, whatever the seed."""
    return ModelConfig(
        name=name,
        architecture="LlamaForCausalLM",
        num_layers=4,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=VOCAB_SIZE,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_context=2048,
        tie_embeddings=False,
        bos_ids=(BOS,),
        eos_ids=(EOS,),
    )


@lru_cache(maxsize=4)
def tiny_tensors(seed: int) -> dict[str, np.ndarray]:
    """Weights as bfloat16 bit patterns (uint16), by Hugging Face key. Do not write to them."""
    random = np.random.Generator(np.random.PCG64(seed))
    tensors = {}
    for name, shape in weight_shapes(tiny_config("tiny")).items():
        if len(shape) == 1:
            values = 1.0 + 0.1 * random.standard_normal(shape)
        elif name == "model.embed_tokens.weight":
            values = random.standard_normal(shape)
        else:
            gain = {"q_proj": QUERY_GAIN, "k_proj": QUERY_GAIN, "lm_head": HEAD_GAIN}.get(name.split(".")[-2], 1.0)
            values = gain * shape[1] ** -0.5 * random.standard_normal(shape)
        tensors[name] = to_bfloat16(values.astype(np.float32))
    return tensors


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte 0..255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def byte_tokenizer() -> dict[str, object]:
    """``tokenizer.json`` of the byte tokenizer: id = byte; 256 begins, 257 ends, 258 pads."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    specials = ((BOS, "<|bos|>"), (EOS, "<|eos|>"), (PAD, "<|pad|>"))
    vocabulary = {char: byte for byte, char in enumerate(byte_alphabet())} | {text: one for one, text in specials}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(one, text) for one, text in specials],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": bpe_model(vocabulary, []),
    }
