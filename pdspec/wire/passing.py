"""Chunks that go on as they came: nearly all of an answer's are tokens alone, and need no type between two messages."""

from __future__ import annotations

from pdspec.wire import pdspec_pb2 as pb


def is_plain(message: pb.DecodeChunk) -> bool:
    """Whether a worker's chunk holds tokens and nothing else."""
    more = message.finish_reason or message.logprobs or message.stop_match
    return not (more or message.HasField("stats") or message.HasField("trace"))


def passed_on(message: pb.DecodeChunk, *, start: int, text: str) -> pb.GenerateChunk:
    """Router → client, of a plain chunk: what ``generate_chunk_to_pb`` makes of its type."""
    return pb.GenerateChunk(request_id=message.request_id, start=start, token_ids=message.token_ids, text=text)
