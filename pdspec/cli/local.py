"""One request in this process, without Ray, gRPC or handoff: the reference of every other path."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator

from pdspec.client import Piece
from pdspec.config import WorkerConfig
from pdspec.types import FinishReason, GenerationStats, UserRequest


class LocalModel:
    """A model, its tokenizer and one drafter, loaded once. Raises what loading raises."""

    def __init__(self, config: WorkerConfig) -> None:
        from pdspec.engine.local import LocalGenerator
        from pdspec.model.tokenizer import load_tokenizer

        self._generator = LocalGenerator(config)
        self._tokenizer = load_tokenizer(config.model, config.cache_dir or None)

    def stream(self, user: UserRequest) -> Iterator[Piece]:
        """What ``RouterClient.stream`` gives for the same request. Raises PdspecError."""
        from pdspec.answer_text import AnswerText
        from pdspec.prompting import prompt_ids, to_generate_request

        ids = prompt_ids(user, self._tokenizer)
        request = to_generate_request(user, ids, request_id="local", seed=secrets.randbits(64))
        sampling = request.sampling
        answer = AnswerText(
            self._tokenizer.stream(), stop_strings=sampling.stop_strings, min_tokens=sampling.min_tokens
        )
        for chunk in self._generator.generate(request):
            part = answer.push(chunk.token_ids)
            if part.stop_match:
                count = chunk.start + part.num_tokens
                yield Piece(
                    chunk=dataclasses.replace(
                        chunk,
                        token_ids=chunk.token_ids[: part.num_tokens],
                        logprobs=chunk.logprobs[: part.num_tokens],
                        finish_reason=FinishReason.STOP,
                        stop_match=part.stop_match,
                        stats=GenerationStats(prompt_tokens=len(ids), output_tokens=count, partial=True),
                    ),
                    text=part.text,
                    seed=sampling.seed or 0,
                )
                return
            tail = answer.flush() if chunk.finish_reason else ""
            yield Piece(chunk=chunk, text=part.text + tail, seed=sampling.seed or 0)
