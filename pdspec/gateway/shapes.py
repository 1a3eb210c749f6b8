"""OpenAI's objects: whole answers, the chunks of streams, log probabilities, usage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdspec.client import Answer
from pdspec.gateway.requests import Asked
from pdspec.resumption import Piece
from pdspec.types import GenerationStats, TokenLogprob

LEAST = -9999.0  # OpenAI's for an impossible token: JSON has no infinity
Object = dict[str, Any]


@dataclass(kw_only=True)
class Shapes:
    """The objects of one HTTP request, called ``name`` by their id; ``model`` as the user named it."""

    asked: Asked
    name: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)  # of choices: characters of their tokens so far
    _stats: dict[int, GenerationStats] = field(default_factory=dict)
    _tokens: dict[int, int] = field(default_factory=dict)

    def whole(self, answers: Sequence[Answer]) -> Object:
        """Without streaming."""
        choices = []
        for index, answer in enumerate(answers):
            self._stats[index], self._tokens[index] = answer.stats, len(answer.token_ids)
            logprobs = self._logprobs(index, answer.logprobs) if self.asked.logprobs else None
            choice: Object = {"index": index, "finish_reason": answer.finish_reason, "logprobs": logprobs}
            if self.asked.chat:
                choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            else:
                choice["text"] = self.asked.echo(index) + answer.text
            choices.append(choice)
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def begin(self, index: int) -> list[Object]:
        """Chunks before the first token of a choice."""
        if self.asked.chat:
            return [self._chunk(index, {"delta": {"role": "assistant", "content": ""}})]
        echo = self.asked.echo(index)
        return [self._chunk(index, {"text": echo})] if echo else []

    def piece(self, index: int, piece: Piece) -> list[Object]:
        """Chunks of one message of the router: its text, then the end where it ends the answer."""
        self._tokens[index] = self._tokens.get(index, 0) + len(piece.chunk.token_ids)
        chunks = []
        logprobs = self._logprobs(index, piece.chunk.logprobs) if self.asked.logprobs else None
        if piece.text or (logprobs and piece.chunk.logprobs):
            part = {"delta": {"content": piece.text}} if self.asked.chat else {"text": piece.text}
            chunks.append(self._chunk(index, part, logprobs=logprobs))
        if piece.chunk.finish_reason:
            self._stats[index] = piece.chunk.stats or GenerationStats()
            last: Object = {"delta": {}} if self.asked.chat else {"text": ""}
            chunks.append(self._chunk(index, last, finish=str(piece.chunk.finish_reason)))
        return chunks

    def usage_chunk(self) -> Object:
        """The last chunk of a stream that was asked for usage."""
        return {**self._head(self._stream_kind()), "choices": [], "usage": self.usage()}

    def usage(self) -> Object:
        """A prompt counts once, however many answers it has."""
        prompts = (self._stats[index].prompt_tokens for index in self._stats if index % self.asked.samples == 0)
        prompt, output = sum(prompts), sum(self._tokens.values())
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _chunk(self, index: int, part: Object, *, logprobs: Object | None = None, finish: str | None = None) -> Object:
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": finish}
        whole = {**self._head(self._stream_kind()), "choices": [choice]}
        return {**whole, "usage": None} if self.asked.include_usage else whole

    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else "text_completion"

    def _head(self, kind: str) -> Object:
        return {
            "id": self.name, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None,
        }  # fmt: skip

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Object:
        if self.asked.chat:
            return {"content": [_chat_logprob(entry) for entry in entries], "refusal": None}
        texts = [_text(entry.text) for entry in entries]
        offsets, at = [], self._offsets.get(index, len(self.asked.echo(index)))
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {
            "tokens": texts, "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [_tops(entry) for entry in entries], "text_offset": offsets,
        }  # fmt: skip


def _chat_logprob(entry: TokenLogprob) -> Object:
    best = [_named(text, value) for (_, value), text in zip(entry.top, entry.top_texts, strict=True)]
    return {**_named(entry.text, entry.logprob), "top_logprobs": best}


def _named(text: bytes, logprob: float) -> Object:
    return {"token": _text(text), "bytes": list(text), "logprob": _finite(logprob)}


def _tops(entry: TokenLogprob) -> Object:
    """By text, where two tokens with the same text count as the better one."""
    named = zip(entry.top, entry.top_texts, strict=True)
    return {_text(text): _finite(value) for (_, value), text in reversed(list(named))}


def _text(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def _finite(value: float) -> float:
    return max(value, LEAST)
