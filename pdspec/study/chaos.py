"""``pdspec chaos``: random faults under load on a cluster of real processes, and every answer compared.

    prompts ──plain decoding in this process──▶ expected answers
       └──▶ clients ──▶ router, relay, 2 prefill, 2 decode workers ◀── SIGKILL, SIGSTOP, damaged frames, full pools

The model is tiny and ``numerics`` exact: an answer that differs in one token is a mistake.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.spec.registry import NAMES
from pdspec.study.chaos_cluster import POLL_S, ChaosCluster, settle
from pdspec.study.chaos_load import PHASES, Outcomes, Task, ask_and_count, make_prompts, make_tasks, references
from pdspec.transfer.faults import KINDS as FRAME_KINDS

ROLES = ("prefill", "decode", "router")
READS_HIDDEN = ("medusa", "eagle1", "eagle2", "eagle3", "mtp", "combined")
LEAST = {"kill": 20, "other": 10, "moved": 100}  # per 1,000 requests
LEAST_COMPLETED, LEAST_DETECTED = 0.97, 0.99


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How hard. Counts are per 1,000 requests, seconds are of wall time."""

    requests: int = 500
    seed: int = 0
    tokens: int = 320  # of the longest answers
    prompts: int = 240  # different ones
    clients: int = 24
    kills: int = 26  # of each role
    stops: int = 12
    cancels: int = 80
    frame_chance: float = 0.0  # of each kind, for each data frame; 0: enough for each to happen
    deadline_s: float = 120.0
    drafters: tuple[str, ...] = NAMES
    model: str = "tiny"


def worker_config(plan: Plan) -> WorkerConfig:
    """Small pools, so that requests wait for pages; quick to cut a peer that stands still."""
    heads = {**dict.fromkeys(READS_HIDDEN, "random:0"), "draft_model": plan.model}
    return WorkerConfig.from_mapping({
        "model": plan.model, "drafters": plan.drafters, "drafter": plan.drafters[0], "dtype": "float32",
        "heads": {name: head for name, head in heads.items() if name in plan.drafters}, "numerics": "exact",
        "options": {"sparse:sink": "2", "sparse:window": "12", "mtp:modules": "3"}, "threads": 1, "chunk": 32,
        "cache_tokens": 6 * (plan.tokens + 128), "stall_timeout_s": 1.5, "log_level": "debug",
    })  # fmt: skip


def run(plan: Plan, progress: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """One JSON object; ``ok`` says whether everything held, ``reasons`` what did not."""
    began, dice = time.monotonic(), random.Random(plan.seed)
    config = worker_config(plan)
    progress("fault-free answers")
    prompts = make_prompts(dice, min(plan.prompts, plan.requests), plan.tokens)
    answers = references(config, prompts)
    tasks = make_tasks(dice, plan.requests, prompts, answers, plan.drafters, _scaled(plan.cancels, plan.requests, 4))
    faults = _schedule(dice, plan)
    chances = dict.fromkeys(FRAME_KINDS, plan.frame_chance or max(0.001, 0.35 / plan.requests))
    cluster = ChaosCluster(
        config, prefill=2, decode=2, prefill_changes={"frame_faults": chances}, progress=progress,
        router_changes={"lost_after_s": 1.0, "failover_wait_s": 60.0, "log_level": "info"},
    )  # fmt: skip
    with cluster:
        progress(f"{plan.requests} requests, {len(faults)} faults")
        outcomes, done = _under_fire(plan, cluster, tasks, faults, progress)
        held = settle(cluster)
        return _judge(plan, cluster, outcomes, done, held, time.monotonic() - began)


Fault = tuple[int, str, str]  # due once so many requests have begun, "kill" | "stop", role


def _scaled(per_thousand: int, requests: int, least: int) -> int:
    return min(requests, max(least, round(per_thousand * requests / 1000)))


def _schedule(dice: random.Random, plan: Plan) -> list[Fault]:
    faults = []
    for kind, count in (("kill", plan.kills), ("stop", plan.stops)):
        for role in ROLES:
            for _ in range(_scaled(count, plan.requests, 1)):
                faults.append((dice.randint(plan.requests // 20, plan.requests * 9 // 10), kind, role))
    return sorted(faults)


def _under_fire(
    plan: Plan, cluster: ChaosCluster, tasks: Sequence[Task], faults: Sequence[Fault],
    progress: Callable[[str], object],
) -> tuple[Outcomes, Counter[str]]:  # fmt: skip
    """Clients work through ``tasks``; none runs ahead of the faults that are due."""
    outcomes, done, todo = Outcomes(), Counter[str](), queue.SimpleQueue[Task]()
    for task in tasks:
        todo.put(task)
    begun, due, over = [0], list(faults), threading.Event()

    def client_loop() -> None:
        with RouterClient(cluster.endpoint, reconnect_s=60.0) as client:
            client.wait_ready(timeout_s=60.0)
            while True:
                while due and begun[0] > due[0][0] + plan.clients:
                    time.sleep(0.02)
                try:
                    task = todo.get_nowait()
                except queue.Empty:
                    return
                with outcomes.lock:
                    begun[0] += 1
                ask_and_count(client, task, plan.deadline_s, outcomes)

    def fault_loop() -> None:
        dice = random.Random(plan.seed + 1)
        while due and not over.is_set():
            if begun[0] < due[0][0]:
                time.sleep(0.02)
                continue
            _, kind, role = due[0]
            names = cluster.up(role)
            if not names:
                time.sleep(0.05)
                continue
            time.sleep(dice.random() * 0.5)  # answers of each phase
            name = dice.choice(names)
            if kind == "kill":
                cluster.kill(name)
            else:
                cluster.pause(name, dice.uniform(0.5, 1.0) if role == "router" else dice.uniform(1.5, 3.0))
            done[f"{kind}_{role}"] += 1
            due.pop(0)

    def watch_loop() -> None:
        while not over.wait(POLL_S):
            cluster.watch()

    threads = [threading.Thread(target=client_loop, daemon=True) for _ in range(plan.clients)]
    others = [threading.Thread(target=loop, daemon=True) for loop in (fault_loop, watch_loop)]
    for thread in (*threads, *others):
        thread.start()
    told = 0.0
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.1)
        if time.monotonic() - told > 20.0:
            told = time.monotonic()
            progress(f"{begun[0]} begun: {dict(outcomes.counts)}, faults {dict(done)}")
    over.set()
    for thread in others:
        thread.join(10.0)
    return outcomes, done


def _judge(
    plan: Plan, cluster: ChaosCluster, outcomes: Outcomes, done: Counter[str], held: dict[str, int], seconds: float
) -> dict[str, Any]:
    frames, damaged, missed = cluster.frame_faults()
    counts, stayed = outcomes.counts, plan.requests - outcomes.counts["cancelled"]
    moved = len(cluster.died_under() & outcomes.completed)
    happened = {
        **{f"{kind}_{role}": done[f"{kind}_{role}"] for kind in ("kill", "stop") for role in ROLES},
        **{f"cancel_{phase}": outcomes.left[phase] for phase in PHASES},
        **{f"frame_{kind}": frames[kind] for kind in FRAME_KINDS}, "full_pool": cluster.counted("waited_for_pages"),
    }  # fmt: skip
    least = {name: _due("kill" if name.startswith("kill") else "other", plan) for name in happened}
    reasons = [f"too few {name}: {count} of {least[name]}" for name, count in happened.items() if count < least[name]]
    if moved < _due("moved", plan):
        reasons.append(f"too few streams moved by a death: {moved} of {_due('moved', plan)}")
    ended = sum(counts[name] for name in ("completed", "failed_with_status", "cancelled"))
    detected = 1 - missed / damaged if damaged else 0.0
    checks = {
        "completed": counts["completed"] >= LEAST_COMPLETED * stayed, "frames detected": detected >= LEAST_DETECTED,
        "no crash": not cluster.crashes,
        **{f"no {name}": not counts[name] for name in ("mismatched", "hung")},
        **{f"no {name}": not count for name, count in held.items()},
        "every request ended": ended == plan.requests,
    }  # fmt: skip
    reasons += [f"not true: {name}" for name, holds in checks.items() if not holds]
    return {
        "ok": not reasons, "reasons": reasons, "requests": plan.requests, "seed": plan.seed, "model": plan.model,
        "drafters": list(plan.drafters), "numerics": "exact",
        **{name: counts[name] for name in ("completed", "mismatched", "failed_with_status", "cancelled", "hung")},
        "completed_share": round(counts["completed"] / max(1, stayed), 4), **held, "crashes": cluster.crashes[:5],
        "faults": happened,
        "handoffs_with_frame_faults": damaged, "frame_faults_detected": round(detected, 4),
        "streams_moved_by_a_death_and_completed": moved, "streams_moved": outcomes.moved,
        "streams_resumed_by_clients": outcomes.resumed, "draft_rebuilds": cluster.counted("draft_rebuilds"),
        "prefill_failures": cluster.counted("prefill_failures"), "statuses": dict(outcomes.statuses),
        "respawn_s_max": round(max(cluster.respawn_s, default=0.0), 2),
        "different": outcomes.different[:5], "failures": outcomes.failures, "seconds": round(seconds, 1),
    }  # fmt: skip


def _due(kind: str, plan: Plan) -> int:
    return max(1, LEAST[kind] * plan.requests // 1000)
