"""Text ↔ target token ids, chat templates, and text that appears while tokens do. No torch: the router uses this.

ids = tokenizer.apply_chat([{"role": "user", "content": "Hello"}])
stream = tokenizer.stream(); text = stream.push(new_ids); ...; text += stream.flush()
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import xxhash
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from pdspec.errors import CheckpointError, InvalidRequest
from pdspec.model.config import read_config, read_json
from pdspec.model.hub import Located, locate
from pdspec.model.pieces import TokenPieces
from pdspec.model.tiny import CHAT_TEMPLATE, EOS, byte_tokenizer

REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
WINDOW, CONTEXT = 32, 8  # ids a stream decodes at once; ids it keeps when it starts over


class Tokenizer:
    """A model's tokenizer. ``eos_ids`` end an answer; ``vocab_size`` counts ids that have a text (a model may have
    more rows). Safe to share between threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        chat_template: str = "",
        tokens: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self._tokens = dict(tokens or {})  # bos_token, eos_token: names a chat template may use
        self._template = _compile(chat_template) if chat_template else None
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._pieces = TokenPieces(backend)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``. Special tokens written out in it are recognised; ``add_special_tokens`` also adds
        those the model wants around plain text (a beginning-of-text id). Raises InvalidRequest."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:
            raise InvalidRequest("not valid Unicode", field="text", remedy="send UTF-8 text") from error
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids without a text are left out, bytes that are no character become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text the model's chat template makes of ``messages`` (each with ``role`` and ``content``). Raises
        InvalidRequest when they are malformed, or the template refuses them or does not exist."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template", field="messages", remedy="send a text prompt")
        if not messages:
            raise InvalidRequest("no message", field="messages", remedy="send at least one with role and content")
        for index, message in enumerate(messages):
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise InvalidRequest(
                    "role and content must both be text", field=f"messages[{index}]", remedy="set both"
                )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the chat template refuses them: {error}", field="messages", remedy="follow the model's chat format"
            ) from error

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of ``render_chat``: the prompt of the assistant's next turn. Raises InvalidRequest."""
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt))

    def stream(self) -> TextStream:
        """A fresh incremental detokeniser for one answer."""
        return TextStream(self)

    def fingerprint(self) -> str:
        """Hash of which id means which text: what a draft head shares with its target. How text is split into ids
        is not part of it, because the same vocabulary is published with differently written splitting rules."""
        vocabulary = sorted((one, text) for text, one in self._backend.get_vocab(with_added_tokens=True).items())
        return xxhash.xxh3_128_hexdigest(json.dumps(vocabulary, ensure_ascii=False).encode())

    def token_bytes(self, token_id: int) -> bytes:
        """What one id adds to a text, which may be a part of a character; a special token by its name. Empty for an id
        without a text."""
        return self._pieces.bytes_of(token_id)

    def to_json(self) -> str:
        """The text of a ``tokenizer.json`` that says all of this but the chat template."""
        text: str = self._backend.to_str()
        return text

    def vocabulary(self) -> dict[int, str]:
        """The text of every id that has one, as the vocabulary writes it (``Ġthe``)."""
        return {one: text for text, one in self._backend.get_vocab(with_added_tokens=True).items()}


class TextStream:
    """Turns ids into text as they come, whole characters only: the pieces joined are ``decode`` of all ids.

    Tokenizers decode a token differently at the start of a text and may need several tokens for one character, so
    a window of recent ids is decoded again and the part not yet given out is returned. (Byte-fallback tokenizers
    decode a run of bytes to U+FFFD as a whole once one is wrong; characters of that run already given out stay.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the window
        self._given = 0  # characters of the window's text that were returned

    def push(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete; an unfinished character waits for its rest."""
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(REPLACEMENT)
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._ids) > WINDOW and len(whole) == len(text):
            self._shrink(text)
        return piece

    def flush(self) -> str:
        """What is left at the end of the answer: unfinished characters, as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _shrink(self, text: str) -> None:
        context = self._ids[-CONTEXT:]
        tail = self._tokenizer.decode(context)
        if tail and text.endswith(tail):  # else the cut lies within a character: try again next time
            self._ids, self._given = context, len(tail)


def load_tokenizer(model: str | Located, cache_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model name or of what ``locate`` or ``resolve`` found; weights are not read.

    Raises what ``locate`` raises, and CheckpointError when the folder has no usable ``tokenizer.json``.
    """
    where = locate(model, cache_dir, weights=False) if isinstance(model, str) else model
    if where.path is None:
        backend = Backend.from_str(json.dumps(byte_tokenizer()))
        return Tokenizer(backend, chat_template=CHAT_TEMPLATE, tokens={"bos_token": "<|bos|>"}, eos_ids=(EOS,))
    return _from_folder(where.path, where.name)


def _from_folder(folder: Path, name: str) -> Tokenizer:
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.exists():
        raise CheckpointError(
            f"{name} has no tokenizer.json in {folder}",
            field="model",
            remedy="write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise CheckpointError(f"{path} is damaged: {error}", field="model", remedy="fetch it again") from error
    settings = read_json(settings_path) if settings_path.exists() else {}
    tokens = {key: _text_of(settings[key]) for key in ("bos_token", "eos_token", "unk_token") if settings.get(key)}
    template_path = folder / "chat_template.jinja"
    template = template_path.read_text(encoding="utf-8") if template_path.exists() else _template_of(settings)
    return Tokenizer(backend, chat_template=template, tokens=tokens, eos_ids=read_config(folder, name).eos_ids)


def _text_of(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _template_of(settings: Mapping[str, Any]) -> str:
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        named = {one["name"]: one["template"] for one in template}
        template = named.get("default", "")
    return str(template)


def _compile(template: str) -> jinja2.Template:
    """Chat templates as transformers runs them, sandboxed."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"damaged chat template: {error}", field="model", remedy="fetch it again") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
