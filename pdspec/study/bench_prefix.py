"""``pdspec bench prefix``: what prefix caches save at the second turn of a chat, and for several samples of a prompt.

Two deployments, with and without caches, are asked the same in turns; their answers and accepted drafts must be equal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from pdspec.client import Answer, RouterClient
from pdspec.config import WorkerConfig
from pdspec.model.files import resolve
from pdspec.study.stack import Stack
from pdspec.types import SamplingParams, UserRequest

Progress = Callable[[str], object]
MODES = {"off": "off", "on": "auto"}


def run(
    *, worker: dict[str, Any], tokens: int, answer_tokens: int, new_tokens: int, samples: int, runs: int,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark. Raises ConfigError for settings that cannot work."""
    config = WorkerConfig.from_mapping(worker)
    vocab_size = resolve(config.model, config.cache_dir or None).config.vocab_size
    turns: dict[str, list[list[Answer]]] = {mode: [] for mode in MODES}
    several: dict[str, list[list[Answer]]] = {mode: [] for mode in MODES}
    with ExitStack() as stack:
        clients = {}
        for mode, cache in MODES.items():
            running = stack.enter_context(Stack(config.replace(prefix_cache=cache), progress=progress))
            clients[mode] = stack.enter_context(RouterClient(running.endpoint))
        for index in range(runs + 1):  # the first one warms up
            ids = tuple((7 * i * i + 31 * index + i) % vocab_size for i in range(tokens))
            for mode, client in clients.items():
                chat = _conversation(client, ids, answer_tokens, new_tokens)
                batch = _samples(client, tuple(reversed(ids)), answer_tokens, samples)
                if index:
                    turns[mode].append(chat)
                    several[mode].append(batch)
            progress(f"conversation {index} of {runs}")
    return {
        "second_turn": {mode: _summary([chat[1] for chat in chats]) for mode, chats in turns.items()},
        "samples": {mode: _summary([one for batch in batches for one in batch]) for mode, batches in several.items()},
        "prompt_tokens": {"first_turn": tokens, "second_turn": tokens + answer_tokens + new_tokens},
        "same_answers": _told(turns["on"]) == _told(turns["off"]) and _told(several["on"]) == _told(several["off"]),
    }


def _conversation(client: RouterClient, ids: tuple[int, ...], answer_tokens: int, new_tokens: int) -> list[Answer]:
    answers: list[Answer] = []
    for _ in range(2):
        answers.append(client.generate(_request(ids, answer_tokens)))
        ids = (*ids, *answers[-1].token_ids, *ids[:new_tokens])
    return answers


def _samples(client: RouterClient, ids: tuple[int, ...], answer_tokens: int, count: int) -> list[Answer]:
    """All at once."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: client.generate(_request(ids, answer_tokens, index, 1.0)), range(count)))


def _request(ids: tuple[int, ...], max_tokens: int, sample: int = 0, temperature: float = 0.0) -> UserRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0, temperature=temperature)
    return UserRequest(prompt_ids=ids, sample=sample, sampling=sampling)


def _told(runs: Sequence[Sequence[Answer]]) -> list[tuple[tuple[int, ...], int, int]]:
    """Tokens, and what was drafted and accepted for them."""
    flat = [answer for answers in runs for answer in answers]
    return [(answer.token_ids, answer.stats.verifications, answer.stats.accepted_tokens) for answer in flat]


def _summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Medians of one request; acceptance over all."""
    stats = [answer.stats for answer in answers]
    verifications = max(1, sum(one.verifications for one in stats))
    return {
        "ttft_ms": statistics.median(answer.ttft_ms for answer in answers),
        "ttft_ms_runs": [answer.ttft_ms for answer in answers],
        "prefill_ms": statistics.median(one.prefill_ms for one in stats),
        "kv_bytes": statistics.median(one.kv_bytes for one in stats),
        "draft_kv_bytes": statistics.median(one.draft_kv_bytes for one in stats),
        "bytes_of_all": sum(one.kv_bytes + one.draft_kv_bytes + one.hidden_bytes for one in stats),
        "cached_tokens": statistics.median(one.cached_tokens for one in stats),
        "prefill_cached_tokens": statistics.median(one.prefill_cached_tokens for one in stats),
        "tokens_per_verification": sum(one.output_tokens - 1 for one in stats) / verifications,
    }
