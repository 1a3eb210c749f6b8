"""From the JSON of ``/v1/chat/completions`` and ``/v1/completions`` to what the router is asked.

OpenAI's fields, and as fields of their own those that pdspec adds (``extra_body`` of OpenAI's client): top_k, min_p,
repetition_penalty, min_tokens, stop_token_ids, ignore_eos, allowed_token_ids, structured_outputs, drafter, tree,
verify, handoff, draft_prefill.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, replace
from typing import Any

from pdspec.errors import InvalidRequest
from pdspec.gateway.fields import Fields, is_integers
from pdspec.types import SamplingParams, UserRequest

MAX_CHOICES = 128  # answers to one HTTP request
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_NAMES = ("model", "drafter", "tree", "handoff", "draft_prefill")
ROLES = {"developer": "system"}  # OpenAI's newer name, which chat templates do not know


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One HTTP request. ``requests`` has one for each choice, in order of their index; ``samples`` of them share a
    prompt. ``echoes`` stand before the text of each prompt's answers."""

    requests: tuple[UserRequest, ...]
    samples: int
    stream: bool
    include_usage: bool
    chat: bool
    logprobs: bool
    echoes: tuple[str, ...] = ()

    def echo(self, index: int) -> str:
        """What stands before the answer of a choice."""
        return self.echoes[index // self.samples] if self.echoes else ""


def chat_request(body: Any, *, max_tokens: int, request_id: str) -> Asked:
    """``max_tokens`` is for requests that name none. Raises InvalidRequest."""
    fields = Fields(body)
    turns = _messages(fields.any("messages"))
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs")
    if top is not None and not wanted:
        raise InvalidRequest("without logprobs", field="top_logprobs", remedy="set logprobs to true, too")
    limit = fields.integer("max_completion_tokens")
    limit = fields.integer("max_tokens") if limit is None else limit
    fields.any("max_tokens")
    sampling = _sampling(fields, max_tokens if limit is None else limit, (top or 0) if wanted else None)
    fields.harmless("tools", [])
    fields.harmless("tool_choice", "none")
    fields.harmless("parallel_tool_calls")  # of no tools
    fields.harmless("modalities", ["text"])
    base = UserRequest(chat=turns, sampling=sampling, fit_context=limit is None)
    return _asked(fields, [base], chat=True, request_id=request_id)


def completion_request(body: Any, *, request_id: str) -> Asked:
    """Raises InvalidRequest."""
    fields = Fields(body)
    prompts = _prompts(fields.any("prompt"))
    limit = fields.integer("max_tokens")
    sampling = _sampling(fields, COMPLETION_TOKENS if limit is None else limit, fields.integer("logprobs"))
    echoes: tuple[str, ...] = ()
    if fields.flag("echo"):
        if sampling.logprobs is not None or any(prompt.text is None for prompt in prompts):
            remedy = "send text, and ask for no log probabilities"
            raise InvalidRequest("only texts are given back", field="echo", remedy=remedy)
        echoes = tuple(prompt.text or "" for prompt in prompts)
    fields.harmless("suffix", "")
    fields.harmless("best_of", fields.integer("n") or 1)
    bases = [replace(prompt, sampling=sampling, fit_context=limit is None) for prompt in prompts]
    asked = _asked(fields, bases, chat=False, request_id=request_id)
    return replace(asked, echoes=echoes)


def _asked(fields: Fields, bases: list[UserRequest], *, chat: bool, request_id: str) -> Asked:
    count = fields.integer("n")
    samples = 1 if count is None else count
    if not 1 <= samples * len(bases) <= MAX_CHOICES:
        remedy = f"ask for 1 to {MAX_CHOICES} choices in all"
        raise InvalidRequest(f"{samples} is not allowed", field="n", remedy=remedy)
    stream, options = fields.flag("stream"), fields.inner("stream_options")
    include_usage = False
    if options:
        if not stream:
            raise InvalidRequest("without stream", field="stream_options", remedy="set stream to true, too")
        include_usage = options.flag("include_usage")
        options.harmless("include_obfuscation", False)
        options.end()
    names: dict[str, Any] = {name: fields.text(name) for name in _NAMES}
    for name in ("user", "metadata", "safety_identifier", "prompt_cache_key"):
        fields.harmless(name)  # for the books of whoever serves
    fields.harmless("store", False)
    fields.harmless("service_tier", "auto", "default")
    fields.end()
    requests = [
        replace(base, **names, sample=sample, request_id=f"{request_id}-{prompt * samples + sample}")
        for prompt, base in enumerate(bases)
        for sample in range(samples)
    ]
    logprobs = bases[0].sampling.logprobs is not None
    return Asked(
        requests=tuple(requests), samples=samples, stream=stream, include_usage=include_usage, chat=chat,
        logprobs=logprobs,
    )  # fmt: skip


def _sampling(fields: Fields, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """The samples of a request share a seed: without one it is drawn here."""
    seed = fields.integer("seed")
    return SamplingParams(
        temperature=fields.number("temperature", 1.0),  # OpenAI's default, not pdspec's
        top_p=fields.number("top_p", 1.0),
        top_k=0 if (top_k := fields.integer("top_k")) in (None, -1) else top_k,  # -1: off, as elsewhere
        min_p=fields.number("min_p", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        logit_bias=_biases(fields),
        allowed_ids=fields.integers("allowed_token_ids"),
        seed=secrets.randbits(64) if seed is None else seed,
        max_tokens=max_tokens,
        min_tokens=fields.integer("min_tokens") or 0,
        stop_ids=fields.integers("stop_token_ids"),
        stop_strings=fields.texts("stop"),
        ignore_eos=fields.flag("ignore_eos"),
        logprobs=logprobs,
        verify=fields.text("verify", SamplingParams().verify),
        **_structure(fields),
    )


def _structure(fields: Fields) -> dict[str, Any]:
    """``response_format``, or ``structured_outputs`` with json, regex or choice."""
    found = [*_response_format(fields), *_structured_outputs(fields)]
    if len(found) > 1:
        message = f"{len(found)} structures are asked for"
        raise InvalidRequest(message, field="structured_outputs", remedy="ask for one")
    return dict(found)


def _response_format(fields: Fields) -> list[tuple[str, Any]]:
    form = fields.inner("response_format")
    if form is None:
        return []
    kind, found = form.text("type"), []
    if kind == "json_object":
        found = [("json_schema", '{"type": "object"}')]
    elif kind == "json_schema":
        inner = form.inner("json_schema")
        if inner is None or inner.any("schema") is None:
            remedy = "give json_schema: {name, schema}"
            raise InvalidRequest("no schema", field="response_format.json_schema", remedy=remedy)
        for name in ("name", "description", "strict"):  # a schema is always followed to the letter
            inner.harmless(name)
        found = [("json_schema", json.dumps(inner.any("schema")))]
        inner.end()
    elif kind == "regex":
        found = [("regex", form.text("regex") or form.text("pattern"))]
    elif kind != "text":
        remedy = "choose one of: text, json_object, json_schema, regex"
        raise InvalidRequest(f"unknown value {kind!r}", field="response_format.type", remedy=remedy)
    form.end()
    return found


def _structured_outputs(fields: Fields) -> list[tuple[str, Any]]:
    outputs = fields.inner("structured_outputs")
    if outputs is None:
        return []
    found: list[tuple[str, Any]] = []
    if (schema := outputs.any("json")) is not None:
        found.append(("json_schema", schema if isinstance(schema, str) else json.dumps(schema)))
    if regex := outputs.text("regex"):
        found.append(("regex", regex))
    if choice := outputs.texts("choice"):
        found.append(("choice", choice))
    outputs.end()
    return found


def _biases(fields: Fields) -> tuple[tuple[int, float], ...]:
    biases = fields.any("logit_bias")
    if biases is None:
        return ()
    try:
        return tuple((int(token), float(bias)) for token, bias in biases.items())
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest("not a map", field="logit_bias", remedy="map token ids to numbers") from error


def _messages(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("no messages", field="messages", remedy="send a list with at least one message")
    turns = []
    for index, message in enumerate(messages):
        fields = Fields(message, f"messages[{index}]")
        role = fields.text("role")
        turns.append((ROLES.get(role, role), _content(fields)))
        fields.harmless("refusal")  # of an assistant's turn that was answered without one
        fields.harmless("tool_calls", [])
        fields.end()
    return tuple(turns)


def _content(fields: Fields) -> str:
    content = fields.any("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("no text", field=fields.name("content"), remedy="give a string or parts of type text")
    texts = []
    for index, part in enumerate(content):
        one = Fields(part, f"{fields.name('content')}[{index}]")
        if one.text("type") != "text":
            raise InvalidRequest("not a text", field=one.name("type"), remedy="this model reads text alone")
        texts.append(one.text("text"))
        one.end()
    return "".join(texts)


def _prompts(prompt: Any) -> list[UserRequest]:
    if isinstance(prompt, str):
        return [UserRequest(text=prompt)]
    if is_integers(prompt) and prompt:
        return [UserRequest(prompt_ids=_int32(prompt))]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
        return [UserRequest(text=one) for one in prompt]
    if isinstance(prompt, list) and prompt and all(is_integers(one) for one in prompt):
        return [UserRequest(prompt_ids=_int32(one)) for one in prompt]
    raise InvalidRequest("no prompt", field="prompt", remedy="give a text, token ids, or a list of either")


def _int32(ids: list[int]) -> tuple[int, ...]:
    if any(not -(1 << 31) <= one < 1 << 31 for one in ids):
        raise InvalidRequest("a number that is no token id", field="prompt", remedy="give ids of the vocabulary")
    return tuple(ids)
