"""Between protobuf messages and ``pdspec.types``: the only file that knows both.

Names: ``x_to_pb`` and ``x_from_pb``. ``*_from_pb`` raise InvalidRequest for what a type cannot hold; whether the
values make sense is for ``pdspec.validation`` to say. Defaults stand only where a field is unset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from pdspec.errors import InvalidRequest
from pdspec.types import (
    DraftTrace,
    FinishReason,
    GenerateRequest,
    GenerationStats,
    Handoff,
    Route,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
    UserRequest,
    WorkerInfo,
)  # fmt: skip
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.ids import bytes_to_ids, ids_to_bytes

_SCALARS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "max_tokens", "min_tokens", "logprobs", "verify", "json_schema", "regex",
)  # fmt: skip
_STATS = tuple(field.name for field in pb.Stats.DESCRIPTOR.fields)
_POSITIONS = ("accepted_per_position", "reached_per_position")
_NAMES = ("request_id", "model", "drafter", "tree", "draft_prefill", "sample", "trace", "priority", "cache_salt")
_USER = (*_NAMES, "handoff", "tenant", "fit_context")
_INFO = (
    "worker_id", "role", "address", "model", "fingerprint", "queued", "running", "free_pages", "total_pages",
    "page_size", "max_context", "vocab_size", "steps", "stepping", "draining", "seats", "overcommit",
)  # fmt: skip


# ------------------------------------------------------------------ requests


def sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    """Unset fields take the defaults of ``SamplingParams``."""
    given = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}  # type: ignore[arg-type]
    return SamplingParams(
        **given,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        allowed_ids=bytes_to_ids(message.allowed_ids, "sampling.allowed_ids"),
        banned_ids=bytes_to_ids(message.banned_ids, "sampling.banned_ids"),
        stop_ids=bytes_to_ids(message.stop_ids, "sampling.stop_ids"),
        stop_strings=tuple(message.stop_strings),
        ignore_eos=message.ignore_eos,
        choice=tuple(message.choice),
    )


def sampling_to_pb(params: SamplingParams) -> pb.SamplingParams:
    """Every scalar is set; ``seed`` and ``logprobs`` unless None. Raises InvalidRequest for what does not fit."""
    message = pb.SamplingParams(ignore_eos=params.ignore_eos)
    for name in _SCALARS:
        if (value := getattr(params, name)) is not None:
            _set(message, name, value)
    for name in ("allowed_ids", "banned_ids", "stop_ids"):
        setattr(message, name, _ids(getattr(params, name), f"sampling.{name}"))
    try:
        message.logit_bias.extend(pb.LogitBias(token_id=token, bias=bias) for token, bias in params.logit_bias)
        message.stop_strings.extend(params.stop_strings)
        message.choice.extend(params.choice)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(str(error), field="sampling", remedy="give ids within int32 and valid Unicode") from error
    return message


def user_request_from_pb(message: pb.GenerateRequest) -> UserRequest:
    """A call of Router/Generate; none of text, chat and prompt_ids may be there (validation refuses it)."""
    kind = message.WhichOneof("input")
    return UserRequest(
        text=message.text if kind == "text" else None,
        chat=tuple((turn.role, turn.content) for turn in message.chat.messages) if kind == "chat" else None,
        prompt_ids=bytes_to_ids(message.prompt_ids, "prompt_ids") if kind == "prompt_ids" else None,
        request_id=message.request_id,
        sampling=sampling_from_pb(message.sampling),
        model=message.model,
        drafter=message.drafter,
        tree=message.tree,
        draft_prefill=message.draft_prefill,
        handoff=message.handoff,
        sample=message.sample,
        trace=message.trace,
        priority=message.priority,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        resume_ids=bytes_to_ids(message.resume_ids, "resume_ids"),
        fit_context=message.fit_context,
    )


def user_request_to_pb(request: UserRequest) -> pb.GenerateRequest:
    """The message a client sends. Raises InvalidRequest for what the message cannot hold."""
    message = pb.GenerateRequest(sampling=sampling_to_pb(request.sampling))
    for name in _USER:
        _set(message, name, getattr(request, name))
    if request.text is not None:
        _set(message, "text", request.text)
    if request.chat is not None:
        turns = (pb.ChatMessage(role=role, content=content) for role, content in request.chat)
        message.chat.CopyFrom(pb.Chat(messages=turns))
    if request.prompt_ids is not None:
        message.prompt_ids = _ids(request.prompt_ids, "prompt_ids")
    message.resume_ids = _ids(request.resume_ids, "resume_ids")
    return message


def worker_request_from_pb(message: pb.WorkerRequest) -> GenerateRequest:
    """The request a worker runs. Raises InvalidRequest naming a field with a broken id list."""
    return GenerateRequest(
        request_id=message.request_id,
        prompt_ids=bytes_to_ids(message.prompt_ids, "prompt_ids"),
        sampling=sampling_from_pb(message.sampling),
        model=message.model,
        drafter=message.drafter,
        tree=message.tree,
        draft_prefill=message.draft_prefill,
        sample=message.sample,
        deadline_s=message.deadline_s if message.deadline_s > 0 else None,
        cache_salt=message.cache_salt,
        replayed=message.replayed,
        trace=message.trace,
        priority=message.priority,
    )


def worker_request_to_pb(request: GenerateRequest) -> pb.WorkerRequest:
    """Raises InvalidRequest for what the message cannot hold."""
    message = pb.WorkerRequest(sampling=sampling_to_pb(request.sampling), deadline_s=request.deadline_s or 0.0)
    for name in (*_NAMES, "replayed"):
        _set(message, name, getattr(request, name))
    message.prompt_ids = _ids(request.prompt_ids, "prompt_ids")
    return message


def worker_request_to_bytes(request: GenerateRequest) -> bytes:
    """The serialised WorkerRequest: what an Open frame carries."""
    return worker_request_to_pb(request).SerializeToString()


def worker_request_from_bytes(data: bytes | memoryview) -> GenerateRequest:
    """Raises InvalidRequest when ``data`` is no WorkerRequest."""
    try:
        return worker_request_from_pb(pb.WorkerRequest.FromString(bytes(data)))
    except DecodeError as error:
        raise InvalidRequest("not a WorkerRequest message", field="request") from error


def route_from_pb(message: pb.Route) -> Route:
    """Raises InvalidRequest for an unknown handoff."""
    return Route(
        decode=message.decode,
        prefill=tuple(message.prefill),
        handoff=handoff_from_name(message.handoff or Handoff.DIRECT.value),
        relay=message.relay,
    )


def route_to_pb(route: Route) -> pb.Route:
    """Plain field by field."""
    return pb.Route(decode=route.decode, prefill=route.prefill, handoff=route.handoff.value, relay=route.relay)


def handoff_from_name(name: str) -> Handoff:
    """Raises InvalidRequest naming ``handoff`` unless ``name`` is "direct" or "relay"."""
    try:
        return Handoff(name)
    except ValueError:
        known = ", ".join(handoff.value for handoff in Handoff)
        raise InvalidRequest(f"unknown handoff {name!r}", field="handoff", remedy=f"choose one of: {known}") from None


def decode_request_from_pb(message: pb.DecodeRequest) -> tuple[GenerateRequest, Route]:
    """What a decode worker is asked to do."""
    return worker_request_from_pb(message.request), route_from_pb(message.route)


def decode_request_to_pb(request: GenerateRequest, route: Route) -> pb.DecodeRequest:
    """What the router sends to ``route.decode``."""
    return pb.DecodeRequest(request=worker_request_to_pb(request), route=route_to_pb(route))


# ------------------------------------------------------------------ answers


def chunk_to_pb(chunk: TokenChunk) -> pb.DecodeChunk:
    """Decode worker → router."""
    return pb.DecodeChunk(**_chunk_fields(chunk))


def chunk_from_pb(message: pb.DecodeChunk | pb.GenerateChunk) -> TokenChunk:
    """Either chunk message. Raises InvalidRequest for an unknown finish reason or a broken id list."""
    return TokenChunk(
        request_id=message.request_id,
        start=message.start,
        token_ids=bytes_to_ids(message.token_ids, "token_ids"),
        logprobs=tuple(logprob_from_pb(entry) for entry in message.logprobs),
        finish_reason=_finish(message.finish_reason),
        stop_match=message.stop_match,
        stats=stats_from_pb(message.stats) if message.HasField("stats") else None,
        trace=trace_from_pb(message.trace) if message.HasField("trace") else None,
    )


def generate_chunk_to_pb(chunk: TokenChunk, *, text: str, seed: int | None = None) -> pb.GenerateChunk:
    """Router → client. ``seed`` goes with the first chunk only."""
    return pb.GenerateChunk(**_chunk_fields(chunk), text=text, seed=seed)


def logprob_to_pb(entry: TokenLogprob) -> pb.TokenLogprob:
    """``top`` is split into ids and values."""
    return pb.TokenLogprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top_ids=ids_to_bytes([token for token, _ in entry.top]),
        top_logprobs=[value for _, value in entry.top],
        text=entry.text,
        top_texts=entry.top_texts,
    )


def logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    """Raises InvalidRequest when there are more or fewer ids than values."""
    ids = bytes_to_ids(message.top_ids, "logprobs.top_ids")
    if len(ids) != len(message.top_logprobs):
        raise InvalidRequest(f"{len(ids)} ids for {len(message.top_logprobs)} values", field="logprobs.top_ids")
    top = tuple(zip(ids, message.top_logprobs, strict=True))
    texts = tuple(message.top_texts)
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, top=top, text=message.text, top_texts=texts)


def trace_to_pb(trace: DraftTrace) -> pb.DraftTrace:
    """Ids and parents as int32 bytes."""
    return pb.DraftTrace(
        token_ids=ids_to_bytes(trace.token_ids), parents=ids_to_bytes(trace.parents), accepted=trace.accepted
    )


def trace_from_pb(message: pb.DraftTrace) -> DraftTrace:
    """Raises InvalidRequest for a broken list."""
    return DraftTrace(
        token_ids=bytes_to_ids(message.token_ids, "trace.token_ids"),
        parents=bytes_to_ids(message.parents, "trace.parents"), accepted=message.accepted,
    )


def stats_to_pb(stats: GenerationStats) -> pb.Stats:
    """Same names on both sides."""
    return pb.Stats(**{name: getattr(stats, name) for name in _STATS})


def stats_from_pb(message: pb.Stats) -> GenerationStats:
    """Same names on both sides."""
    values: dict[str, Any] = {name: getattr(message, name) for name in _STATS}
    values |= {name: tuple(values[name]) for name in _POSITIONS}
    return GenerationStats(**values)


def worker_info_to_pb(info: WorkerInfo) -> pb.WorkerStatus:
    """What a worker answers to Status."""
    values = {name: getattr(info, name) for name in _INFO}
    return pb.WorkerStatus(**values, drafters=info.drafters, unreachable=info.unreachable, metrics=info.metrics)


def worker_info_from_pb(message: pb.WorkerStatus) -> WorkerInfo:
    """The router's own fields (state, reason, pending) are left out."""
    values = {name: getattr(message, name) for name in _INFO}
    drafters, unreachable = tuple(message.drafters), tuple(message.unreachable)
    return WorkerInfo(**values, drafters=drafters, unreachable=unreachable, metrics=dict(message.metrics))


# ------------------------------------------------------------------ helpers


def _chunk_fields(chunk: TokenChunk) -> dict[str, Any]:
    return {
        "request_id": chunk.request_id,
        "start": chunk.start,
        "token_ids": ids_to_bytes(chunk.token_ids),
        "logprobs": [logprob_to_pb(entry) for entry in chunk.logprobs],
        "finish_reason": chunk.finish_reason.value if chunk.finish_reason else "",
        "stop_match": chunk.stop_match,
        "stats": stats_to_pb(chunk.stats) if chunk.stats else None,
        "trace": trace_to_pb(chunk.trace) if chunk.trace else None,
    }


def _finish(name: str) -> FinishReason | None:
    try:
        return FinishReason(name) if name else None
    except ValueError:
        raise InvalidRequest(f"unknown finish reason {name!r}", field="finish_reason") from None


def _set(message: Any, name: str, value: Any) -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        remedy = "give a value of the type and range in proto/pdspec.proto"
        raise InvalidRequest(str(error), field=name, remedy=remedy) from error


def _ids(ids: Sequence[int], field: str) -> bytes:
    try:
        return ids_to_bytes(ids)
    except (OverflowError, TypeError) as error:
        raise InvalidRequest(str(error), field=field, remedy="token ids are int32") from error
