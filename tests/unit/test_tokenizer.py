"""Tokenizer: ids, chat templates as transformers renders them, streaming, and no torch for the router."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from pdspec.errors import CheckpointError, InvalidRequest, UnknownName
from pdspec.model.hub import Located
from pdspec.model.tiny import byte_tokenizer, tiny_config
from pdspec.model.tokenizer import Tokenizer, load_tokenizer

TINY = load_tokenizer("tiny")
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Count:\n\n1, 2 — and {{ 3 }}? "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Go on"},
]
TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}
    {%- if loop.first and message.role != 'system' %}{% continue %}{% endif %}
{{ bos_token }}{{ message['role'] | upper }} {{ message | tojson }}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}ASSISTANT{% endif %}"""


def sentencepiece_style() -> Tokenizer:
    """The decoder of Llama 2 and Mistral: ▁ for spaces, <0xNN> for bytes, the first space of a text dropped."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ("▁", "▁hello", "▁wor", "ld", "é", ",", "▁▁"):
        vocabulary[piece] = len(vocabulary)
    return Tokenizer(
        Backend.from_str(
            json.dumps(
                {
                    "version": "1.0",
                    "added_tokens": [],
                    "decoder": {
                        "type": "Sequence",
                        "decoders": [
                            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                            {"type": "ByteFallback"},
                            {"type": "Fuse"},
                            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                        ],
                    },
                    "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True},
                }
            )
        )
    )


SENTENCEPIECE = sentencepiece_style()


def write_folder(folder: Path, template: str, **settings_: object) -> Located:
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    tokens = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **settings_}))
    config = tiny_config("folder")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": [config.architecture],
                "num_hidden_layers": 1,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "vocab_size": 272,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 64,
                "eos_token_id": 257,
            }
        )
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 257]}))
    return Located(name="folder", path=folder)


def test_bytes_are_ids() -> None:
    text = "héllo\n\x00 日本 🎉"
    assert TINY.encode(text) == list(text.encode())
    assert TINY.decode(list(text.encode())) == text
    assert TINY.vocab_size == 259 and TINY.eos_ids == (257,)


def test_special_tokens_are_recognised_and_left_out_of_text() -> None:
    assert TINY.encode("a<|eos|>b") == [97, 257, 98]
    assert TINY.decode([256, 97, 257]) == "a"
    assert TINY.decode([256, 97, 257], skip_special_tokens=False) == "<|bos|>a<|eos|>"
    assert TINY.decode([97, 270, 98]) == "ab"


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="text: not valid Unicode"):
        TINY.encode("a\ud800")


def test_tiny_chat_is_the_prompt_of_the_next_turn() -> None:
    ids = TINY.apply_chat([{"role": "user", "content": "hi"}])
    assert TINY.decode(ids, skip_special_tokens=False) == "<|bos|>user: hi\nassistant: "
    assert ids[0] == 256


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_as_transformers_renders_it(tmp_path: Path, add_generation_prompt: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(write_folder(tmp_path, TEMPLATE))
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=TEMPLATE,
    )
    for messages in (CONVERSATION, CONVERSATION[1:]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert ours.render_chat(messages, add_generation_prompt=add_generation_prompt) == text
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.apply_chat(messages, add_generation_prompt=add_generation_prompt) == wanted


def test_end_tokens_come_from_both_configs(tmp_path: Path) -> None:
    assert load_tokenizer(write_folder(tmp_path, "")).eos_ids == (258, 257)


def test_template_file_wins_and_named_templates_use_default(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    where = write_folder(tmp_path, "", chat_template=named)
    assert load_tokenizer(where).render_chat(CONVERSATION) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(where).render_chat(CONVERSATION) == "J"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages: no message"),
        ([{"role": "user"}], r"messages\[0\]"),
        ([CONVERSATION[0], {"role": "user", "content": None}], r"messages\[1\]"),
        ([{"role": "wizard", "content": "x"}], "unknown role"),
    ],
)
def test_bad_messages_are_named(tmp_path: Path, messages: list[dict[str, str]], named: str) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, TEMPLATE))
    with pytest.raises(InvalidRequest, match=named):
        tokenizer.apply_chat(messages)


def test_no_template_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_tokenizer(write_folder(tmp_path, "")).apply_chat(CONVERSATION)


def test_templates_are_sandboxed(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"
    with pytest.raises(InvalidRequest, match="refuses"):
        load_tokenizer(write_folder(tmp_path, escape)).render_chat(CONVERSATION)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged chat template"):
        load_tokenizer(write_folder(tmp_path, "{% if %}"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json is damaged"):
        load_tokenizer(Located(name="folder", path=tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer.json"):
        load_tokenizer(Located(name="folder", path=tmp_path))
    with pytest.raises(UnknownName, match="no model 'nonsense'"):
        load_tokenizer("nonsense")


def test_stream_waits_for_whole_characters() -> None:
    stream = TINY.stream()
    pieces = [stream.push([byte]) for byte in "aé🎉".encode()]
    assert pieces == ["a", "", "é", "", "", "", "🎉"]
    assert stream.push("日".encode()[:2]) == ""
    assert stream.flush() == "\ufffd" and stream.flush() == ""


def test_stream_keeps_spaces_that_only_a_text_start_drops() -> None:
    hello, wor, ld = (SENTENCEPIECE._backend.token_to_id(piece) for piece in ("▁hello", "▁wor", "ld"))
    stream = SENTENCEPIECE.stream()
    assert [stream.push([one]) for one in (hello, wor, ld)] == ["hello", " wor", "ld"]


@pytest.mark.parametrize("tokenizer", [TINY, SENTENCEPIECE], ids=["byte-level", "byte-fallback"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_joined_are_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = st.text(max_size=8).map(lambda one: list(one.encode("utf-8", "ignore")))
    # byte fallback turns a whole run of bytes into U+FFFD when a later one is wrong, too late for what is out already
    lowest = 0 if tokenizer is TINY else 256
    noise = st.lists(st.integers(lowest, tokenizer.vocab_size + 3), max_size=6)
    ids = [one for part in data.draw(st.lists(text | noise, max_size=30)) for one in part]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=40)))
    stream, pieces = tokenizer.stream(), []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        pieces.append(stream.push(ids[start:stop]))
        assert len(stream._ids) <= len(ids)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_window_stays_short() -> None:
    stream = TINY.stream()
    for byte in b"plain text " * 100:
        stream.push([byte])
        assert len(stream._ids) <= 33


def test_fingerprint_is_the_vocabulary() -> None:
    assert TINY.fingerprint() == load_tokenizer("tiny-9").fingerprint()
    other = byte_tokenizer()
    other["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert Tokenizer(Backend.from_str(json.dumps(other))).fingerprint() == TINY.fingerprint()
    vocabulary = other["model"]["vocab"]  # type: ignore[index]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    assert Tokenizer(Backend.from_str(json.dumps(other))).fingerprint() != TINY.fingerprint()


def test_the_router_pays_for_no_torch() -> None:
    code = "import sys, pdspec.model.tokenizer, pdspec.model.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
