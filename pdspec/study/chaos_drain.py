"""``pdspec chaos drain``: every process of a loaded deployment is restarted in turn, and a worker changes its role.

    clients, without a break ──▶ router, relay, 2 prefill, 2 decode workers
        SIGTERM of each in turn ─▶ it drains, ends, and its supervisor starts it anew
        Worker/Drain with a role ─▶ a prefill worker becomes the third decode worker, and comes back

No request may be lost, and every answer is compared with plain decoding's. Part of them are longer than a worker may
take to drain: they move.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.errors import PeerLost
from pdspec.study.chaos_cluster import ChaosCluster, settle
from pdspec.study.chaos_load import Outcomes, Task, ask_and_count, make_prompts, make_tasks, references

Progress = Callable[[str], object]
WAIT_S = 120.0  # for a process to be back


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``clients`` at once; ``rounds`` times every process; an answer has up to ``tokens`` tokens and may take
    ``drain_s`` to end where it is."""

    clients: int = 8
    rounds: int = 1
    tokens: int = 320
    prompts: int = 48
    drain_s: float = 0.5
    seed: int = 0


def run(worker: WorkerConfig, plan: Plan, progress: Progress) -> dict[str, Any]:
    """One JSON object; ``ok`` says whether everything held, ``reasons`` what did not."""
    dice, began = random.Random(plan.seed), time.monotonic()
    progress("undisturbed answers")
    prompts = make_prompts(dice, plan.prompts, plan.tokens)
    answers = references(worker, prompts)
    tasks = make_tasks(dice, 20 * plan.prompts, prompts, answers, worker.drafters, 0)
    outcomes, over = Outcomes(), threading.Event()
    cluster = ChaosCluster(
        worker.replace(drain_s=plan.drain_s), prefill=2, decode=2, progress=progress,
        router_changes={"drain_s": plan.drain_s, "failover_wait_s": WAIT_S},
    )  # fmt: skip
    with cluster:
        threads = [
            threading.Thread(target=_ask_on, args=(cluster, tasks[index :: plan.clients], outcomes, over), daemon=True)
            for index in range(plan.clients)
        ]
        for thread in threads:
            thread.start()
        rows = []
        try:
            for name in [*_order(cluster)] * plan.rounds:
                progress(f"{name} drains; {dict(outcomes.counts)}")
                rows.append({"process": name, **_restarted(cluster, name)})
            for role in ("decode", "prefill"):
                progress(f"prefill-1 becomes a {role} worker")
                rows.append({"process": "prefill-1", **_switched(cluster, "prefill-1", role, plan.drain_s)})
        finally:
            over.set()
            for thread in threads:
                thread.join(WAIT_S)
        crashes, held = cluster.crashes, settle(cluster)
    return _judge(worker, plan, outcomes, rows, crashes, held, time.monotonic() - began)


def _order(cluster: ChaosCluster) -> tuple[str, ...]:
    return (*cluster.names("decode"), *cluster.names("prefill"), "relay", "router")


def _ask_on(cluster: ChaosCluster, tasks: list[Task], outcomes: Outcomes, over: threading.Event) -> None:
    with RouterClient(cluster.endpoint, reconnect_s=WAIT_S) as client:
        client.wait_ready(timeout_s=WAIT_S)
        turn = 0
        while not over.is_set():
            ask_and_count(client, tasks[turn % len(tasks)], WAIT_S, outcomes)
            turn += 1


def _restarted(cluster: ChaosCluster, name: str) -> dict[str, Any]:
    """Seconds from SIGTERM until the new process takes requests."""
    old, began = cluster.processes[name].pid, time.monotonic()
    cluster.drain(name)
    with RouterClient(cluster.endpoint, reconnect_s=WAIT_S) as client:
        _until(lambda: cluster.processes[name].pid != old and name in cluster.up(name.split("-")[0]))
        client.wait_ready(workers=4, timeout_s=WAIT_S)
    return {"what": "restart", "seconds": round(time.monotonic() - began, 2)}


def _switched(cluster: ChaosCluster, name: str, role: str, drain_s: float) -> dict[str, Any]:
    """Seconds until it takes requests in its new role; the process must be the same."""
    pid, began, address = cluster.processes[name].pid, time.monotonic(), cluster.address_of(name)
    cluster.switch(name, role, drain_s)
    with RouterClient(cluster.endpoint) as client:
        _until(lambda: any(
            entry["address"] == address and (entry["role"], entry["state"]) == (role, "ready")
            for entry in client.workers()
        ))  # fmt: skip
        served = time.monotonic() - began
        before = _steps(client, address)
        _until(lambda: _steps(client, address) > before)
    return {"what": f"switch to {role}", "seconds": round(served, 2),
            "same_process": cluster.processes[name].pid == pid}


def _steps(client: RouterClient, address: str) -> int:
    return next((int(entry["steps"]) for entry in client.workers() if entry["address"] == address), 0)


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise PeerLost(f"a process was not back after {WAIT_S:g} s", remedy="see its log")
        time.sleep(0.05)


def _judge(
    worker: WorkerConfig, plan: Plan, outcomes: Outcomes, rows: list[dict[str, Any]], crashes: list[str],
    held: dict[str, int], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    counts = outcomes.counts
    checks = {
        "no request was lost": not counts["failed_with_status"] and not counts["hung"],
        "every answer is the undisturbed one": counts["completed"] > 0 and not counts["mismatched"],
        "answers moved": outcomes.moved > 0, "no process crashed": not crashes,
        "nothing is left": not any(held.values()),
        "a switch keeps the process": all(row.get("same_process", True) for row in rows),
    }  # fmt: skip
    reasons = [f"not true: {name}" for name, holds in checks.items() if not holds]
    return {
        "ok": not reasons, "reasons": reasons, "model": worker.model, "drafters": list(worker.drafters),
        "clients": plan.clients, "drain_s": plan.drain_s,
        **{name: counts[name] for name in ("completed", "failed_with_status", "mismatched", "hung")},
        "moved": outcomes.moved, "resumed_by_clients": outcomes.resumed, **held, "steps": rows,
        "crashes": crashes[:3], "failures": outcomes.failures, "different": outcomes.different[:3],
        "seconds": round(seconds, 1),
    }  # fmt: skip
