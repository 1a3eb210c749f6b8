"""``pdspec chaos kill-decode`` and ``detect``: one fault at a time, and how long it was felt."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from pdspec.client import Piece, RouterClient, collect
from pdspec.config import WorkerConfig
from pdspec.errors import Cancelled, PdspecError, PeerLost
from pdspec.study.chaos_cluster import ChaosCluster
from pdspec.types import SamplingParams, UserRequest

Progress = Callable[[str], object]
PROMPT = "Explain, step by step, how a steam engine turns heat into motion."
LOOK_S = 0.01
MAX_PAUSE_S, MAX_DETECT_S, MAX_RESPAWN_S, MAX_FREE_S = 2.0, 1.0, 15.0, 1.0


def kill_decode(*, worker: WorkerConfig, max_tokens: int, kill_after: int, progress: Progress) -> dict[str, Any]:
    """SIGKILL of the decode worker in mid-answer, another one standing by. The same request without the kill, on the
    same cluster, says what must come."""
    user = UserRequest(
        chat=(("user", PROMPT),), drafter=worker.drafter,
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.7, seed=5, logprobs=0),
    )  # fmt: skip
    with ChaosCluster(worker, prefill=1, decode=2, progress=progress) as cluster:
        with RouterClient(cluster.endpoint) as client:
            progress("without a kill")
            whole = client.generate(user)
            progress("with one")
            times: list[float] = []
            pieces: list[Piece] = []
            killed, count, at = "", 0, 0.0
            for piece in client.stream(user):
                times.append(time.perf_counter())
                pieces.append(piece)
                count += len(piece.chunk.token_ids)
                if not killed and count >= kill_after:
                    killed, at = _serving(cluster), time.perf_counter()
                    cluster.kill(killed)
        answer = collect(iter(pieces))
        exact = all(
            (status := cluster.status(name)) is not None and status.metrics.get("numerics_exact") == 1.0
            for name in cluster.up("decode")
        )
    gaps = [after - before for before, after in itertools.pairwise(times) if after > at]
    pause, reasons = max(gaps, default=0.0), []
    same = {
        "tokens": answer.token_ids == whole.token_ids, "text": answer.text == whole.text,
        "logprobs": answer.logprobs == whole.logprobs,
        "usage": (answer.stats.output_tokens, answer.stats.prompt_tokens)
        == (whole.stats.output_tokens, whole.stats.prompt_tokens),
    }  # fmt: skip
    reasons += [f"other {name}" for name, equal in same.items() if not equal]
    if pause > MAX_PAUSE_S:
        reasons.append(f"a pause of {pause:.2f} s")
    if answer.stats.moves != 1 or not killed:
        reasons.append(f"{answer.stats.moves} moves")
    return {
        "ok": not reasons, "reasons": reasons, "model": worker.model, "drafter": worker.drafter,
        "numerics_exact": exact, "tokens": len(answer.token_ids), "killed": killed, "killed_after_tokens": kill_after,
        "pause_s": round(pause, 3), "median_gap_s": round(sorted(gaps)[len(gaps) // 2], 4) if gaps else None,
        "moves": answer.stats.moves, **{f"same_{name}": equal for name, equal in same.items()},
    }  # fmt: skip


def detect(*, worker: WorkerConfig, concurrent: int, progress: Progress) -> dict[str, Any]:
    """SIGKILL and SIGSTOP of a worker of each role: seconds until the router routes around it, and until it serves
    again; then cancels, and the router's death, at ``concurrent`` requests: seconds until both sides hold no page."""
    rows, reasons = [], []
    with ChaosCluster(worker, prefill=2, decode=2, progress=progress) as cluster, \
            RouterClient(cluster.endpoint) as client:  # fmt: skip
        for role in ("prefill", "decode"):
            for how in ("SIGKILL", "SIGSTOP"):
                progress(f"{how} of a {role} worker")
                row = _detect_one(cluster, client, role, how)
                rows.append(row)
                if not row["rerouted_s"] <= MAX_DETECT_S:
                    reasons.append(f"{how} of {role} noticed after {row['rerouted_s']} s")
                if not row["serving_again_s"] <= MAX_RESPAWN_S:
                    reasons.append(f"{how} of {role}: serving again after {row['serving_again_s']} s")
                if not row["answered"]:
                    reasons.append(f"{how} of {role}: no answer meanwhile")
        freed = {}
        for what in ("cancel", "router_kill"):
            progress(f"{what} at {concurrent} requests")
            freed[what] = _freed(cluster, concurrent, what)
            if not freed[what] <= MAX_FREE_S:
                reasons.append(f"{what}: pages were free after {freed[what]} s")
    return {
        "ok": not reasons, "reasons": reasons, "faults": rows, "concurrent": concurrent, "pages_free_s": freed,
        "not_measured": "the loss of a whole Ray node: these are plain processes",
    }  # fmt: skip


def _serving(cluster: ChaosCluster) -> str:
    for name in cluster.names("decode"):
        status = cluster.status(name)
        if status is not None and status.running:
            return name
    raise PeerLost("no decode worker runs the answer: it ended before it could be killed", remedy="ask for more tokens")


def _detect_one(cluster: ChaosCluster, client: RouterClient, role: str, how: str) -> dict[str, Any]:
    name = cluster.names(role)[0]
    address = cluster.address_of(name)
    client.wait_ready(workers=4, timeout_s=120.0)
    began = time.monotonic()
    if how == "SIGKILL":
        cluster.kill(name)
    else:
        cluster.pause(name, 3.0)
    rerouted = _until(lambda: _state(client, address) != "ready", began)
    try:
        params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
        answered = len(client.generate(UserRequest(text="Hello", sampling=params), timeout_s=30.0).token_ids) == 8
    except PdspecError:
        answered = False
    again = _until(lambda: _state(client, address) == "ready", began)
    return {
        "role": role, "fault": how, "rerouted_s": rerouted, "answered": answered,
        "serving_again_s": round(again - (3.0 if how == "SIGSTOP" else 0.0), 3),
    }  # fmt: skip


def _state(client: RouterClient, address: str) -> str:
    return next((entry["state"] for entry in client.workers() if entry["address"] == address), "gone")


def _until(condition: Callable[[], bool], began: float, limit_s: float = 120.0) -> float:
    """Seconds from ``began`` until ``condition``; infinite when it never holds."""
    while time.monotonic() - began < limit_s:
        if condition():
            return round(time.monotonic() - began, 3)
        time.sleep(LOOK_S)
    return float("inf")


def _freed(cluster: ChaosCluster, concurrent: int, what: str) -> float:
    clients = [RouterClient(cluster.endpoint, reconnect_s=0.0) for _ in range(concurrent)]
    started = threading.Semaphore(0)

    def one(index: int) -> None:
        params = SamplingParams(max_tokens=1500, seed=index, ignore_eos=True, temperature=1.0)
        try:
            for number, _ in enumerate(clients[index].stream(UserRequest(text=f"Request {index}", sampling=params))):
                if number == 0:
                    started.release()
        except Cancelled:
            return
        except PdspecError as error:
            if what == "cancel":  # nobody but the client ended it
                failures.append(str(error))
            started.release()

    failures: list[str] = []
    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(concurrent)]
    for thread in threads:
        thread.start()
    for _ in range(concurrent // 4):  # the others wait for pages, or are being prefilled
        started.acquire(timeout=60.0)
    began = time.monotonic()
    if what == "cancel":
        for client in clients:
            client.cancel()
    else:
        cluster.kill("router")
    workers = (*cluster.names("prefill"), *cluster.names("decode"))

    def free() -> bool:
        states = [cluster.status(name) for name in workers]
        return all(state is not None and state.free_pages == state.total_pages for state in states)

    seconds = _until(free, began, 30.0)
    for thread in threads:
        thread.join(10.0)
    for client in clients:
        client.close()
    return seconds if not failures else float("inf")


def tiny_config() -> WorkerConfig:
    """What ``detect`` runs on: the model does not matter."""
    base = WorkerConfig(model="tiny", drafters=("none", "eagle3"), drafter="eagle3", heads={"eagle3": "random:0"})
    return dataclasses.replace(base, threads=1, cache_tokens=32768)
