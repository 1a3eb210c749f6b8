"""What chaos is asked: requests of every kind, their fault-free answers, and clients that may leave."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdspec.answer_text import AnswerText
from pdspec.client import Answer, RouterClient, collect
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import Cancelled, PdspecError
from pdspec.model.tokenizer import load_tokenizer
from pdspec.spec.registry import family
from pdspec.types import FinishReason, GenerateRequest, SamplingParams, TokenLogprob, UserRequest

PHASES = ("queued", "first", "middle", "late")  # when a client leaves
QUEUED_S = 0.03  # then a client that leaves early does, whatever has become of its request
BATCH = 16
TREES = {"chain": "chain(3)", "static": "static(2x2)", "dynamic": "dynamic(3,2,5)"}
EXAMPLES = 3
TOLERANCE = 1e-4  # of a log probability, which travels as float32


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A fault-free answer."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One request. ``leave``: the phase at which its client goes away, empty: it stays."""

    user: UserRequest
    expected: Expected
    leave: str = ""


def make_prompts(random_: random.Random, count: int, tokens: int) -> list[GenerateRequest]:
    """Different prompts and ways of sampling; answers of up to ``tokens``."""
    kinds = (
        SamplingParams(), SamplingParams(temperature=0.8, top_p=0.95), SamplingParams(temperature=1.0, logprobs=2),
        SamplingParams(temperature=0.9, repetition_penalty=1.2, presence_penalty=0.4, min_tokens=tokens // 2),
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.3, logprobs=0),
        SamplingParams(temperature=1.0, top_k=40, stop_strings=("ab", "e t", "qu")),
    )  # fmt: skip
    found = []
    for index in range(count):
        length = random_.randint(4, 90)
        params = replace(
            kinds[index % len(kinds)], seed=random_.getrandbits(64), max_tokens=random_.randint(tokens // 2, tokens),
            ignore_eos=index % 3 > 0,
        )  # fmt: skip
        ids = tuple(random_.randrange(32, 123) for _ in range(length))
        found.append(GenerateRequest(request_id=str(index), prompt_ids=ids, sampling=params, drafter="none"))
    return found


def references(config: WorkerConfig, requests: Sequence[GenerateRequest]) -> list[Expected]:
    """Plain decoding in this process: no drafter, no handoff, no faults."""
    local = LocalGenerator(
        config.replace(drafters=("none",), drafter="none", heads={}, options={}, frame_faults={}, num_pages=0,
                       cache_tokens=65536)
    )  # fmt: skip
    tokenizer, found = load_tokenizer(config.model, config.cache_dir or None), []
    try:
        for start in range(0, len(requests), BATCH):
            part = [replace(r, sampling=replace(r.sampling, stop_strings=())) for r in requests[start : start + BATCH]]
            ids: list[list[int]] = [[] for _ in part]
            logprobs: list[list[TokenLogprob]] = [[] for _ in part]
            finish = [""] * len(part)
            for index, chunk in local.generate_batch(part):
                ids[index] += chunk.token_ids
                logprobs[index] += chunk.logprobs
                finish[index] = str(chunk.finish_reason or "")
            for index, request in enumerate(requests[start : start + BATCH]):
                params = request.sampling
                text = AnswerText(tokenizer.stream(), stop_strings=params.stop_strings, min_tokens=params.min_tokens)
                piece = text.push(ids[index])
                count = piece.num_tokens
                found.append(Expected(
                    token_ids=tuple(ids[index][:count]), logprobs=tuple(logprobs[index][:count]),
                    text=piece.text if piece.stop_match else piece.text + text.flush(),
                    finish_reason=FinishReason.STOP.value if piece.stop_match else finish[index],
                ))  # fmt: skip
    finally:
        local.resources.close()
    return found


def make_tasks(
    random_: random.Random, count: int, prompts: Sequence[GenerateRequest], answers: Sequence[Expected],
    drafters: Sequence[str], cancels: int,
) -> list[Task]:  # fmt: skip
    """``count`` requests over all families, trees and both handoffs, of which ``cancels`` are left by their client."""
    leaving = dict(zip(random_.sample(range(count), cancels), (PHASES * cancels)[:cancels], strict=True))
    tasks = []
    for index in range(count):
        which = random_.randrange(len(prompts))
        drafter = drafters[index % len(drafters)]
        trees = family(drafter).DESCRIPTION.trees
        user = UserRequest(
            prompt_ids=prompts[which].prompt_ids, sampling=prompts[which].sampling, request_id=f"chaos-{index}",
            drafter=drafter, tree=TREES[random_.choice(trees)] if trees else "",
            handoff="relay" if random_.random() < 0.25 else "direct",
            draft_prefill=random_.choice(("prefill", "decode")),
        )  # fmt: skip
        tasks.append(Task(user=user, expected=answers[which], leave=leaving.get(index, "")))
    return tasks


class Outcomes:
    """Filled by the clients' threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()  # completed, mismatched, failed_with_status, cancelled, hung
        self.left: Counter[str] = Counter()  # by phase
        self.statuses: Counter[str] = Counter()
        self.different: list[str] = []
        self.failures: dict[str, list[str]] = {}  # the first of each status
        self.completed: set[str] = set()
        self.resumed = self.moved = 0

    def add(
        self, task: Task, answer: Answer | PdspecError | None, *, resumed: bool, seconds: float, limit_s: float
    ) -> None:
        """``answer`` None: the client left."""
        with self.lock:
            if seconds > limit_s + 5.0:
                self.counts["hung"] += 1
            if answer is None:
                self.counts["cancelled"] += 1
                self.left[task.leave] += 1
            elif isinstance(answer, PdspecError):
                self.counts["failed_with_status"] += 1
                self.statuses[answer.status] += 1
                known = self.failures.setdefault(answer.status, [])
                if len(known) < EXAMPLES:
                    known.append(f"{task.user.request_id}: {answer}"[:300])
            else:
                self.counts["completed"] += 1
                self.completed.add(task.user.request_id)
                self.resumed += resumed
                self.moved += answer.stats.moves > 0
                if wrong := difference(task, answer):
                    self.counts["mismatched"] += 1
                    self.different.append(f"{task.user.request_id} {task.user.drafter} {task.user.tree}: {wrong}")


def difference(task: Task, answer: Answer) -> str:
    """What differs from the fault-free answer, empty when nothing does."""
    due = task.expected
    if answer.token_ids != due.token_ids:
        same = next((i for i, (a, b) in enumerate(zip(answer.token_ids, due.token_ids, strict=False)) if a != b), -1)
        return f"{len(answer.token_ids)} tokens of {len(due.token_ids)}, first different: {same}"
    if (answer.text, answer.finish_reason) != (due.text, due.finish_reason):
        return f"text or finish reason: {answer.finish_reason}, due {due.finish_reason}"
    usage = answer.stats.prompt_tokens, answer.stats.output_tokens
    if usage != (len(task.user.prompt_ids or ()), len(due.token_ids)):
        return f"usage {usage}"
    if task.user.sampling.logprobs is not None:
        mine, theirs = answer.logprobs, due.logprobs
        if [entry.token_id for entry in mine] != [entry.token_id for entry in theirs] or any(
            abs(a.logprob - b.logprob) > TOLERANCE for a, b in zip(mine, theirs, strict=True)
        ):
            return "log probabilities"
    return ""


def ask(client: RouterClient, task: Task, limit_s: float) -> Answer | None:
    """The answer, or None when the client left as it was to. Raises what the cluster says."""
    if not task.leave:
        return client.generate(task.user, timeout_s=limit_s)
    half, count = len(task.expected.token_ids) // 2, 0
    pieces = client.stream(task.user, timeout_s=limit_s)
    got = []
    timer = threading.Timer(QUEUED_S, client.cancel)
    if task.leave == "queued":
        timer.start()
    try:
        for piece in pieces:
            got.append(piece)
            count += len(piece.chunk.token_ids)
            if (
                task.leave == "first" or (task.leave == "middle" and count >= half)
                or (task.leave == "late" and count >= 2 * half - 4)
            ):  # fmt: skip
                return None
    except Cancelled:
        return None
    finally:
        timer.cancel()
        pieces.close()  # type: ignore[attr-defined]
    return collect(iter(got)) if got and got[-1].chunk.finish_reason else None


def ask_and_count(client: RouterClient, task: Task, limit_s: float, outcomes: Outcomes) -> None:
    """``ask``, and what became of it."""
    before, began = client.reconnects, time.monotonic()
    answer: Answer | PdspecError | None
    try:
        answer = ask(client, task, limit_s)
    except PdspecError as error:
        answer = error
    outcomes.add(
        task, answer, resumed=client.reconnects > before, seconds=time.monotonic() - began, limit_s=limit_s
    )
