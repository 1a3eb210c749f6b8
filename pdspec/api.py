"""``pdspec.Client`` and ``pdspec.AsyncClient``: the short way to ask a running deployment.

    import pdspec

    with pdspec.Client("127.0.0.1:50051") as client:
        answer = client.chat("Why is the sky blue?", max_tokens=200)
        print(answer.text, answer.stats.acceptance_length)
        for piece in client.stream("Once upon a time", temperature=0.8, seed=7):
            print(piece.text, end="", flush=True)

    async with pdspec.AsyncClient("127.0.0.1:50051") as client:
        answer = await client.generate("Once upon a time", stop=["\\n"])
        async for piece in client.stream_chat([{"role": "user", "content": "Hello"}]):
            print(piece.text, end="", flush=True)

A prompt is a text, continued as it is, or a list of token ids. A chat is one user's text or a list of ``{"role": …,
"content": …}``. All of them take the same options (``Options``); an unknown one is an InvalidRequest. Errors are those
of ``pdspec.errors``: InvalidRequest and UnknownName name the field and the remedy, Overloaded says when to try again.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from pdspec.async_client import AsyncRouterClient
from pdspec.client import Access, Answer, RouterClient
from pdspec.config import TlsConfig
from pdspec.errors import InvalidRequest
from pdspec.resumption import RECONNECT_S, Piece
from pdspec.types import SamplingParams, UserRequest

DEFAULT_ENDPOINT = "127.0.0.1:50051"
Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, str]]


class Options(TypedDict, total=False):
    """What a request may say beyond its prompt; the defaults are those of ``SamplingParams`` (greedy, 128 tokens)."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    allowed_ids: Sequence[int]
    banned_ids: Sequence[int]
    seed: int  # without one the router draws it: Answer.seed
    stop: str | Sequence[str]
    stop_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int  # 0: of the chosen tokens; n: and of the n best
    json_schema: Mapping[str, Any] | str  # the answer is JSON that it allows
    regex: str  # the answer matches it
    choice: Sequence[str]  # the answer is one of these
    verify: str  # coupled, rejection, block or greedy
    model: str
    drafter: str
    tree: str
    draft_prefill: str
    handoff: str
    sample: int  # of several answers to one prompt and seed
    request_id: str
    trace: bool
    fit_context: bool  # lower max_tokens to what the context leaves
    timeout_s: float  # for the whole answer


class Client:
    """A blocking client; not shared between threads. ``token`` and the PEM files are what a deployment with TLS or
    tokens asks for (docs/operations.md). Raises ConfigError for files that cannot be read."""

    def __init__(
        self, endpoint: str = DEFAULT_ENDPOINT, *, token: str = "", tls_ca: str = "", tls_cert: str = "",
        tls_key: str = "", reconnect_s: float = RECONNECT_S,
    ) -> None:  # fmt: skip
        self._client = RouterClient(endpoint, _access(token, tls_ca, tls_cert, tls_key), reconnect_s=reconnect_s)

    def generate(
        self, prompt: Prompt, *, on_text: Callable[[str], None] | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Continue a text or token ids. ``on_text`` is called with each new part of the text."""
        request, timeout_s = _prompt_request(prompt, options)
        return self._client.generate(request, on_text=on_text, timeout_s=timeout_s)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Piece]:
        """The same, piece by piece: one for each verification. Closing the iterator cancels the request."""
        request, timeout_s = _prompt_request(prompt, options)
        return self._client.stream(request, timeout_s=timeout_s)

    def chat(
        self, messages: Messages, *, on_text: Callable[[str], None] | None = None, **options: Unpack[Options]
    ) -> Answer:
        """The assistant's next turn, by the model's chat template."""
        request, timeout_s = _chat_request(messages, options)
        return self._client.generate(request, on_text=on_text, timeout_s=timeout_s)

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> Iterator[Piece]:
        """The same, piece by piece."""
        request, timeout_s = _chat_request(messages, options)
        return self._client.stream(request, timeout_s=timeout_s)

    def workers(self) -> list[dict[str, Any]]:
        """What the router knows of each worker."""
        return self._client.workers()

    def close(self) -> None:
        """End every call."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio, any number of calls at once on one event loop. Made within it."""

    def __init__(
        self, endpoint: str = DEFAULT_ENDPOINT, *, token: str = "", tls_ca: str = "", tls_cert: str = "",
        tls_key: str = "", reconnect_s: float = RECONNECT_S,
    ) -> None:  # fmt: skip
        self._client = AsyncRouterClient(endpoint, _access(token, tls_ca, tls_cert, tls_key), reconnect_s=reconnect_s)

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Continue a text or token ids. Cancelling the task cancels the request on every hop."""
        request, timeout_s = _prompt_request(prompt, options)
        return await self._client.generate(request, timeout_s=timeout_s)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """The same, piece by piece. Whoever may leave early closes it (``contextlib.aclosing``)."""
        request, timeout_s = _prompt_request(prompt, options)
        return self._client.stream(request, timeout_s=timeout_s)

    async def chat(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """The assistant's next turn, by the model's chat template."""
        request, timeout_s = _chat_request(messages, options)
        return await self._client.generate(request, timeout_s=timeout_s)

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """The same, piece by piece."""
        request, timeout_s = _chat_request(messages, options)
        return self._client.stream(request, timeout_s=timeout_s)

    async def workers(self) -> list[dict[str, Any]]:
        """What the router knows of each worker."""
        return await self._client.workers()

    async def close(self) -> None:
        """End every call."""
        await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


def _access(token: str, ca: str, cert: str, key: str) -> Access:
    return Access(tls=TlsConfig(ca=ca, cert=cert, key=key), token=token)


def _prompt_request(prompt: Prompt, options: Options) -> tuple[UserRequest, float | None]:
    if isinstance(prompt, str):
        return _request({"text": prompt}, options)
    return _request({"prompt_ids": tuple(prompt)}, options)


def _chat_request(messages: Messages, options: Options) -> tuple[UserRequest, float | None]:
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    try:
        chat = tuple((turn["role"], turn["content"]) for turn in turns)
    except (KeyError, TypeError) as error:
        remedy = 'send {"role": …, "content": …} for each'
        raise InvalidRequest("a message without role or content", field="messages", remedy=remedy) from error
    return _request({"chat": chat}, options)


_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_REQUEST = frozenset(field.name for field in dataclasses.fields(UserRequest))


def _request(prompt: dict[str, Any], options: Options) -> tuple[UserRequest, float | None]:
    """(request, timeout_s). Raises InvalidRequest for an unknown option."""
    given: dict[str, Any] = dict(options)
    if unknown := given.keys() - Options.__annotations__.keys():
        near = difflib.get_close_matches(min(unknown), Options.__annotations__, n=1)
        remedy = f"did you mean {near[0]}?" if near else "see pdspec.api.Options"
        raise InvalidRequest("unknown option", field=min(unknown), remedy=remedy)
    timeout_s = given.pop("timeout_s", None)
    if (stop := given.pop("stop", None)) is not None:
        given["stop_strings"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if isinstance(given.get("json_schema"), Mapping):
        given["json_schema"] = json.dumps(given["json_schema"])
    if "logit_bias" in given:
        given["logit_bias"] = tuple(given["logit_bias"].items())
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    sampling = SamplingParams(**{name: value for name, value in given.items() if name in _SAMPLING})
    rest = {name: value for name, value in given.items() if name in _REQUEST}
    return UserRequest(**prompt, **rest, sampling=sampling), timeout_s
