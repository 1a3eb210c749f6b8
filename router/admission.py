"""From what a user sent to a request that workers can run: tokenised, checked, numbered and stamped with a seed."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from pdspec.answer_text import TextStream
from pdspec.grammar import check_structure
from pdspec.prompting import PromptTokenizer, prompt_ids, to_generate_request
from pdspec.types import GenerateRequest, UserRequest
from pdspec.validation import check_request, check_resume, check_user_request
from router.policy import WorkerState, WorkerView

LONG_TEXT = 4096  # characters from which tokenising would hold up other streams
_UNKNOWN_CONTEXT = 1 << 31


class RouterTokenizer(PromptTokenizer, Protocol):
    """What the router needs of ``pdspec.model.tokenizer.Tokenizer``."""

    vocab_size: int

    def token_bytes(self, token_id: int) -> bytes:
        """What one id adds to a text."""

    def stream(self) -> TextStream:
        """A fresh incremental detokeniser."""


async def admit(
    user: UserRequest,
    *,
    tokenizer: RouterTokenizer,
    workers: Sequence[WorkerView],
    model: str,
    deadline_s: float | None = None,
) -> GenerateRequest:
    """Raises InvalidRequest or UnknownName. Limits and names are those that the workers report; ``model`` is the
    router's own name for what is deployed. A missing seed is drawn here (64 bits), before routing."""
    check_user_request(user)
    if _characters(user) > LONG_TEXT:
        ids = await asyncio.to_thread(prompt_ids, user, tokenizer)
    else:
        ids = prompt_ids(user, tokenizer)
    request = to_generate_request(
        user, ids, request_id=uuid.uuid4().hex, seed=secrets.randbits(64), deadline_s=deadline_s
    )
    infos = [w.info for w in workers if w.info and w.role == "decode" and w.state is not WorkerState.REFUSED]
    drafters = {name for info in infos for name in info.drafters} if infos else {request.drafter}
    vocab_size = _limit([info.vocab_size for info in infos], tokenizer.vocab_size)
    check_resume(user, vocab_size=vocab_size)
    max_context = _limit([info.max_context for info in infos], _UNKNOWN_CONTEXT)
    if user.fit_context:
        request = _fitted(request, max_context)
    check_request(
        request,
        vocab_size=vocab_size,
        max_context=max_context,
        drafters=drafters,
        models={model, *(info.model for info in infos)},
    )
    if request.sampling.structured:
        await asyncio.to_thread(check_structure, request.sampling)
    return request


def _fitted(request: GenerateRequest, max_context: int) -> GenerateRequest:
    """``max_tokens`` lowered to the room behind the prompt; a prompt that leaves none is refused as ever."""
    room = max(1, max_context - len(request.prompt_ids))
    if request.sampling.max_tokens <= room:
        return request
    return replace(request, sampling=replace(request.sampling, max_tokens=room))


def _characters(user: UserRequest) -> int:
    return len(user.text or "") + sum(len(content) for _, content in user.chat or ())


def _limit(values: list[int], default: int) -> int:
    return min(values, default=default)
