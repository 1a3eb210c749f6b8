"""``pdspec chaos pressure``: more long answers at once than the KV pool holds, and what that costs.

    concurrency 4, 8, 16 (the pool holds them)  ─┐ in turn, several rounds, on the same processes
    all at once (4 times what the pool holds)   ─┘ every answer compared with plain decoding in this process

The pool is cut so that it holds ``holds`` whole answers. Over-commitment lets all of them in; pages are taken from some
and given back. The best fixed concurrency is what an operator could have chosen instead.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pdspec.cache.pool import pages_for
from pdspec.client import Answer, RouterClient
from pdspec.config import WorkerConfig
from pdspec.errors import PdspecError
from pdspec.study.chaos_load import Expected, Task, difference, references
from pdspec.study.stack import Stack
from pdspec.types import GenerateRequest, SamplingParams, UserRequest
from pdspec.wire import pdspec_pb2 as pb

Progress = Callable[[str], object]
LEAST_THROUGHPUT = 0.85  # of the best fixed concurrency
PROMPT_TOKENS, SCRATCH = 32, 68  # rows of a prompt, and behind an answer (the widest draft)
LIMIT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``answers`` of ``tokens`` tokens at once in a pool that holds ``holds``."""

    answers: int = 64
    holds: int = 16
    tokens: int = 512
    rounds: int = 2
    fixed: tuple[int, ...] = (4, 8, 16)
    seed: int = 0


def pressed(worker: WorkerConfig, plan: Plan) -> WorkerConfig:
    """``worker`` with a pool of ``plan.holds`` answers, all of them let in."""
    pages = plan.holds * pages_for(PROMPT_TOKENS + plan.tokens + SCRATCH, worker.page_size)
    return worker.replace(
        num_pages=pages, kv_overcommit=2.0 * plan.answers / plan.holds, reserve_headroom=plan.tokens // 8,
        max_batch=max(worker.max_batch, plan.answers),
    )  # fmt: skip


def run(worker: WorkerConfig, plan: Plan, progress: Progress) -> dict[str, Any]:
    """One JSON object; ``ok`` says whether everything held, ``reasons`` what did not."""
    began, worker = time.monotonic(), pressed(worker, plan)
    progress("undisturbed answers")
    tasks = make_tasks(worker, plan)
    speeds: dict[int, list[float]] = {count: [] for count in (*plan.fixed, plan.answers)}
    wrong: list[str] = []
    with Stack(worker, prefill=1, decode=1, progress=progress) as stack:
        for round_ in range(plan.rounds):
            for count in speeds if round_ % 2 == 0 else reversed(speeds):
                before = decode_status(stack)
                seconds, differences = run_all(stack, tasks, count)
                wrong += differences
                tokens = sum(len(task.expected.token_ids) for task in tasks)
                speeds[count].append(tokens / seconds)
                taken = decode_status(stack).metrics["retractions"] - before.metrics["retractions"]
                progress(f"{count} at once: {tokens / seconds:.0f} tokens/s, {taken:.0f} retractions")
        status = decode_status(stack)
        drained = _wait(lambda: (now := decode_status(stack)).free_pages == now.total_pages, 5.0)
    means = {count: statistics.fmean(found) for count, found in speeds.items()}
    best = max(plan.fixed, key=lambda count: means[count])
    share = means[plan.answers] / means[best]
    checks = {
        "every answer is the undisturbed one": not wrong, "pages were taken": status.metrics["retractions"] > 0,
        f"throughput is at least {LEAST_THROUGHPUT:g} of the best fixed": share >= LEAST_THROUGHPUT,
        "every page is free afterwards": drained,
    }  # fmt: skip
    reasons = [f"not true: {name}" for name, holds in checks.items() if not holds]
    return {
        "ok": not reasons, "reasons": reasons, "model": worker.model, "drafters": list(worker.drafters),
        "answers": plan.answers, "pool_holds": plan.holds, "tokens_each": plan.tokens, "rounds": plan.rounds,
        "numerics_exact": status.metrics["numerics_exact"] == 1.0, "different": wrong[:5],
        "tokens_per_s": {str(count): round(value, 1) for count, value in means.items()},
        "tokens_per_s_of_each_round": {str(count): [round(one, 1) for one in found] for count, found in speeds.items()},
        "best_fixed_concurrency": best, "throughput_of_best_fixed": round(share, 3),
        **{name: int(status.metrics[name]) for name in (
            "retractions", "retractions_kept", "retractions_replayed", "resumed", "retracted_bytes",
            "retract_memory_exceeded")},
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def make_tasks(worker: WorkerConfig, plan: Plan) -> list[Task]:
    """Prompts of ``PROMPT_TOKENS`` tokens over the worker's drafters, half of them sampled, and their answers."""
    dice, asked = random.Random(plan.seed), []
    for index in range(plan.answers):
        ids = tuple(dice.randrange(32, 123) for _ in range(PROMPT_TOKENS))
        params = SamplingParams(
            seed=dice.getrandbits(63), temperature=0.8 * (index % 2), max_tokens=plan.tokens, ignore_eos=True
        )
        asked.append(GenerateRequest(request_id=str(index), prompt_ids=ids, sampling=params, drafter="none"))
    answers = references(worker.replace(num_pages=0), asked)
    return [_task(one, due, worker.drafters[i % len(worker.drafters)]) for i, (one, due) in
            enumerate(zip(asked, answers, strict=True))]  # fmt: skip


def _task(asked: GenerateRequest, due: Expected, drafter: str) -> Task:
    user = UserRequest(prompt_ids=asked.prompt_ids, sampling=asked.sampling, drafter=drafter)
    return Task(user=user, expected=due)


def run_all(stack: Stack, tasks: Sequence[Task], concurrency: int) -> tuple[float, list[str]]:
    """All tasks, ``concurrency`` at once: seconds, and what is wrong with which answer."""
    local = threading.local()
    clients: list[RouterClient] = []

    def one(index: int) -> str:
        if not hasattr(local, "client"):
            local.client = RouterClient(stack.endpoint)
            clients.append(local.client)
        try:
            answer: Answer = local.client.generate(tasks[index].user, timeout_s=LIMIT_S)
        except PdspecError as error:
            return f"{index}: {error}"
        found = difference(tasks[index], answer)
        return f"{index} {tasks[index].user.drafter}: {found}" if found else ""

    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        found = list(pool.map(one, range(len(tasks))))
    seconds = time.perf_counter() - began
    for client in clients:
        client.close()
    return seconds, [text for text in found if text]


def decode_status(stack: Stack) -> pb.WorkerStatus:
    """The decode worker's own Status. Raises PeerLost when it does not answer."""
    return stack.status_of(stack.addresses["decode"][0])


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()
