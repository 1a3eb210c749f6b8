"""From what a user sends to prompt ids, the same way behind the router and in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from pdspec.errors import InvalidRequest
from pdspec.types import GenerateRequest, UserRequest


class PromptTokenizer(Protocol):
    """What is needed of ``pdspec.model.tokenizer.Tokenizer``."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``."""

    def apply_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next turn begins."""


def prompt_ids(user: UserRequest, tokenizer: PromptTokenizer) -> tuple[int, ...]:
    """Token ids of ``user``'s one input: text with the special tokens the model wants around plain text, chat by its
    template. Raises InvalidRequest."""
    if user.prompt_ids is not None:
        return user.prompt_ids
    if user.chat is not None:
        return tuple(tokenizer.apply_chat([{"role": role, "content": content} for role, content in user.chat]))
    if user.text is not None:
        return tuple(tokenizer.encode(user.text, add_special_tokens=True))
    raise InvalidRequest("no input was given", field="input", remedy="send text, chat or prompt_ids")


def to_generate_request(
    user: UserRequest, ids: tuple[int, ...], *, request_id: str, seed: int, deadline_s: float | None = None
) -> GenerateRequest:
    """The request that workers run. ``seed`` is used when the user gave none."""
    sampling = user.sampling
    if sampling.seed is None:
        sampling = replace(sampling, seed=seed)
    return GenerateRequest(
        request_id=user.request_id or request_id,
        prompt_ids=ids,
        sampling=sampling,
        model=user.model,
        drafter=user.drafter,
        tree=user.tree,
        draft_prefill=user.draft_prefill,
        sample=user.sample,
        trace=user.trace,
        priority=user.priority,
        cache_salt=user.cache_salt,
        deadline_s=deadline_s,
    )
