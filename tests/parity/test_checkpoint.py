"""The default model as converted: pinned content, the ids of its tokenizer, and sense in what it writes."""

from __future__ import annotations

import pytest
import torch

from pdspec.model.hub import ALIASES
from pdspec.model.loader import load_weights, resolve
from pdspec.model.reference import reference_model
from pdspec.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.model
MODEL = "smollm2-135m"
TEXTS = [
    "In 2024, 12345.678 people paid $9.99 each.",
    "def f(x):\n    return x**2  # squared\t\n\n",
    "Don't they'll\r\n\r\n  say “naïve café” — ½?",
    "日本語のテキスト, русский, العربية, 🎉🇫🇷\u200d",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "   leading and trailing   ",
]


def test_content_is_pinned_and_complete() -> None:
    files = resolve(MODEL)
    pinned = ALIASES[MODEL].wheel
    assert pinned is not None and files.content_hash == pinned.content_hash
    config = files.config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.tie_embeddings and config.eos_ids == (2,) and config.max_context == 8192
    weights = load_weights(files, "bfloat16")
    assert len(weights) == 272 and all(torch.isfinite(one).all() for one in weights.values())


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_its_ids(text: str) -> None:
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    stream = tokenizer.stream()
    assert "".join(stream.push([one]) for one in ids) + stream.flush() == tokenizer.decode(ids)


def test_chat_ids() -> None:
    tokenizer = load_tokenizer(MODEL)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    wanted = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat([{"role": "user", "content": "Hi 42"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == wanted
    assert ids.count(1) == 3 and ids.count(2) == 2 and tokenizer.eos_ids == (2,)
    assert tokenizer.encode("42") == [tokenizer.encode("4")[0], tokenizer.encode("2")[0]]  # digits stand alone


@torch.inference_mode()
def test_greedy_text_makes_sense() -> None:
    files, tokenizer = resolve(MODEL), load_tokenizer(MODEL)
    model = reference_model(files, "float32")
    ids = tokenizer.apply_chat([{"role": "user", "content": "What is the capital of France?"}])
    out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    assert tokenizer.decode(out) == "The capital of France is Paris." and out[-1] == 2
