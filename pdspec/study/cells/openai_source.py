"""Any server with OpenAI's chat completions as a cell: the same client, requests and moments.

Such a server does not say which tokens a message brings, nor how many it verified: there is no acceptance of it. The
number of output tokens is what ``usage`` says at the end, or else the number of messages. Prompt tokens and how many of
them were cached are known where it says both (``prompt_tokens_details``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any, Self

import aiohttp

from pdspec.errors import InvalidRequest, Overloaded, PeerLost
from pdspec.study.cells.client import Heard
from pdspec.types import GenerationStats, UserRequest

_BUSY = (429, 503)
_SILENT_S = 600.0  # without a message


class OpenAISource:
    """``url`` as OpenAI's clients take it (http://host:port/v1); ``token`` is sent where it is not empty."""

    def __init__(self, url: str, token: str = "") -> None:
        self.url, self._token = url.rstrip("/"), token

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=_SILENT_S)
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=limits, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def stream(self, request: UserRequest) -> AsyncGenerator[Heard, None]:
        """Raises Overloaded where the server has no room, InvalidRequest where it refuses, PeerLost where it breaks."""
        finish, tokens, stats = "", 0, GenerationStats()
        try:
            async with self._session.post(f"{self.url}/chat/completions", json=body(request)) as answer:
                if answer.status in _BUSY:
                    raise Overloaded(f"HTTP {answer.status}")
                if answer.status != 200:
                    message = f"{self.url} answered HTTP {answer.status}: {(await answer.text())[:200]}"
                    raise InvalidRequest(message, field="pd", remedy="check URL and model of the endpoint")
                async for line in answer.content:
                    event = _event(line)
                    finish, tokens = finish_of(event) or finish, tokens_of(event) or tokens
                    stats = stats_of(event) or stats
                    if text_of(event):
                        yield Heard(text=content_of(event))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise PeerLost(f"{self.url}: {error!r}", field="pd") from error
        yield Heard(brings=False, finish_reason=finish, output_tokens=tokens, stats=stats)


def body(request: UserRequest) -> dict[str, Any]:
    """The request as JSON; ``ignore_eos`` (vLLM, SGLang, llama.cpp and this project know it) only where it is asked."""
    params = request.sampling
    asked = {"ignore_eos": True} if params.ignore_eos else {}
    return {
        "model": request.model, "messages": [{"role": role, "content": text} for role, text in request.chat or ()],
        "temperature": params.temperature, "top_p": params.top_p, "max_tokens": params.max_tokens, "seed": params.seed,
        "stream": True, "stream_options": {"include_usage": True}, **asked,
    }  # fmt: skip


def _event(line: bytes) -> dict[str, Any]:
    """Of a line of a server-sent event stream; empty for others. Raises ValueError."""
    kind, _, data = line.partition(b":")
    data = data.strip()
    if kind != b"data" or not data or data == b"[DONE]":
        return {}
    found = json.loads(data)
    if not isinstance(found, dict) or "error" in found:
        raise ValueError(str(found)[:200])
    return found


def content_of(event: dict[str, Any]) -> str:
    """What the message adds to the answer: a chat's client sends no thoughts back."""
    return str(_delta(event).get("content") or "")


def text_of(event: dict[str, Any]) -> str:
    """What the message adds, thoughts included."""
    delta = _delta(event)
    return str(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or "")


def _delta(event: dict[str, Any]) -> dict[str, Any]:
    return (event.get("choices") or [{}])[0].get("delta") or {}


def finish_of(event: dict[str, Any]) -> str:
    """Why it ended, where the message says so."""
    return str((event.get("choices") or [{}])[0].get("finish_reason") or "")


def tokens_of(event: dict[str, Any]) -> int:
    """Output tokens of the usage, where the message has it."""
    return int((event.get("usage") or {}).get("completion_tokens") or 0)


def stats_of(event: dict[str, Any]) -> GenerationStats | None:
    """Prompt tokens and those of them that were cached, of a usage that says both."""
    usage = event.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is None or not usage.get("prompt_tokens"):
        return None
    return GenerationStats(prompt_tokens=int(usage["prompt_tokens"]), cached_tokens=int(cached))
