"""User turns of a cell's conversations: what follows an answer, and a document before the first question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pdspec.errors import ConfigError
from pdspec.prompts import Prompt

FOLLOW_UPS = (  # for prompts whose file has no later turn
    "Please explain the most important part of that in more detail.",
    "Give one example that shows it.",
    "What could go wrong there, and what would you do about it?",
    "Say the same again in half as many words.",
    "Sum up our conversation in three sentences.",
)
_TRIES = 12


class ChatTokenizer(Protocol):
    """What is needed of ``pdspec.model.tokenizer.Tokenizer``."""

    def encode(self, text: str) -> list[int]:
        """Token ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text."""

    def apply_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The prompt of the next answer."""


def follow_up(prompt: Prompt, turn: int) -> str:
    """What the user says in ``turn`` (the second is 2): the file's words, or else general ones."""
    place = turn - 2
    return prompt.later[place] if place < len(prompt.later) else FOLLOW_UPS[place % len(FOLLOW_UPS)]


def long_texts(prompts: Sequence[Prompt], tokenizer: ChatTokenizer, tokens: int) -> list[str]:
    """Each prompt behind a document, so that the chat's first turn has ``tokens`` tokens, template included (or as
    many as whole tokens of the document allow). The document is made of the prompts that follow in the file, and again
    from the first. Raises ConfigError where a prompt has more tokens itself."""
    sizes = [max(1, len(tokenizer.encode(prompt.text))) for prompt in prompts]
    return [_long_text(prompts, sizes, place, tokenizer, tokens) for place in range(len(prompts))]


def _long_text(
    prompts: Sequence[Prompt], sizes: Sequence[int], place: int, tokenizer: ChatTokenizer, tokens: int
) -> str:
    question = prompts[place].text
    alone = _size(tokenizer, question)
    if alone > tokens:
        message = f"the prompt {prompts[place].id!r} has {alone} tokens with its template, more than {tokens}"
        raise ConfigError(message, field="prompt_tokens", remedy=f"give at least {alone}, or 0")
    best, most = question, alone
    ids = tokenizer.encode(_document(prompts, sizes, place + 1, tokens))
    cut = tokens - alone
    for _ in range(_TRIES):  # a cut may change how its neighbours are split into tokens
        text = f"{tokenizer.decode(ids[:cut])}\n\n{question}"
        found = _size(tokenizer, text)
        if most < found <= tokens:
            best, most = text, found
        if most == tokens or not cut:
            break
        cut = max(0, cut + tokens - found)
    return best


def _document(prompts: Sequence[Prompt], sizes: Sequence[int], place: int, tokens: int) -> str:
    texts, have = list[str](), 0
    while have < tokens:
        texts.append(prompts[place % len(prompts)].text)
        have += sizes[place % len(prompts)]
        place += 1
    return "\n\n".join(texts)


def _size(tokenizer: ChatTokenizer, text: str) -> int:
    return len(tokenizer.apply_chat([{"role": "user", "content": text}]))
