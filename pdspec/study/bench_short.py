"""``pdspec bench short`` (``make bench``): every CPU figure in a short form, each beside what is promised of it.

Few prompts and runs: this shows whether a figure is there, not its second digit. The single benches say more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pdspec.errors import ConfigError
from pdspec.settings import unknown_name
from pdspec.study import bench_decode, bench_handoff, bench_mixed, bench_peers, bench_router, bench_step, bench_stream
from pdspec.study.peers.find import find
from pdspec.study.settings import Setting
from pdspec.study.workloads import REPETITIVE, workload

Progress = Callable[[str], object]
REPETITIVE_SPEEDUP = 3.0  # that some drafter reaches over plain decoding where answers repeat their prompts
TO_TRANSFORMERS = 2.0  # plain decoding, at least
_HANDOFF_STEP = 1.1  # a decode step beside a landing handoff, over a quiet one

Row = dict[str, Any]  # section, figure, found, floor, sense (">=", "<=" or "" where nothing is promised), ok


def row(section: str, figure: str, found: float, sense: str = "", floor: float | None = None) -> Row:
    """One line of the table. ``sense`` says on which side of ``floor`` the figure is promised to be."""
    ok = True if floor is None else found >= floor if sense == ">=" else found <= floor
    return {"section": section, "figure": figure, "found": found, "sense": sense, "floor": floor, "ok": ok}


class Short:
    """The sections by name; each yields its rows."""

    def __init__(self, worker: dict[str, Any], peers: str, progress: Progress) -> None:
        self.worker, self.peers, self.progress = worker, peers, progress

    def decode(self) -> Iterator[Row]:
        """Batch 1 through the full path, beside transformers and the memory's own limit."""
        found = self._decode(("none", "ngram", "eagle3"), vs_transformers=True, num_prompts=4, max_tokens=64, nodes=5)
        rates = {name: one["tokens_per_second"] for name, one in found["drafters"].items()}
        yield row("decode", "plain tokens/s", rates["none"])
        most = found["floors"]["tokens_per_second"]
        yield row("decode", "share of what reading the weights allows", rates["none"] / most)
        yield row("decode", "plain to transformers", found["ratio"], ">=", TO_TRANSFORMERS)
        for name in ("ngram", "eagle3"):
            yield row("decode", f"{name} to plain", found["drafters"][name]["speedup_over_none"])
        for length, one in found["prefill"].items():
            yield row("prefill", f"{length} tokens, to transformers", one["ratio"])

    def repetitive(self) -> Iterator[Row]:
        """Answers that repeat their prompts."""
        found = self._decode(
            ("none", "ngram"), vs_transformers=False, prompts=workload(REPETITIVE), num_prompts=6, max_tokens=128,
            nodes=16,
        )  # fmt: skip
        yield row("repetitive", "ngram to plain", found["best_speedup"], ">=", REPETITIVE_SPEEDUP)

    def step(self) -> Iterator[Row]:
        """Python, noise and processors at batch 8."""
        found = bench_step.run(
            worker=self.worker, settings=[Setting("none")], batch=8, temperature=0.6, top_p=0.95, prompts=None,
            num_prompts=8, max_tokens=32, runs=2, progress=self.progress,
        )  # fmt: skip
        for floor in found["floors"]:
            yield row("step, batch 8", floor["name"], floor["found"], "<=", floor["wanted"])

    def router(self) -> Iterator[Row]:
        """First tokens and chunks of workers that compute nothing."""
        found = bench_router.run(
            model=self.worker.get("model", "smollm2-135m"), streams=64, chunks=200, prompt_tokens=512, requests=200,
            runs=2, progress=self.progress,
        )  # fmt: skip
        for floor, sense in zip(found["floors"], ("<=", ">="), strict=True):
            yield row("router", floor["name"], floor["found"], sense, floor["wanted"])
        yield row("router", "CPU microseconds per chunk", found["chunks"]["router_cpu_us"])

    def mixed(self) -> Iterator[Row]:
        """Long prompts beside long answers."""
        found = bench_mixed.run(
            worker=self.worker, drafter="none", answers=2, prompt_tokens=1536, rate=0.4, arrivals=8, step_ms=6.0,
            chunks=(32, 64, 128), runs=1, progress=self.progress,
        )  # fmt: skip
        name = f"P99 between tokens, to {found['best_colocated']}"
        yield row("mixed", name, found["itl_p99_ratio"], "<=", found["wanted"])

    def stream(self) -> Iterator[Row]:
        """What the movers carry."""
        found = bench_stream.run(worker=self.worker, tokens=1024, megabytes=256, runs=2, progress=self.progress)
        for path, one in found["paths"].items():
            yield row("stream", f"{path}, GB/s of a handoff", one["handoff"]["bytes_per_second"] / 1e9)

    def handoff(self) -> Iterator[Row]:
        """Exposed time, and decode steps while one lands."""
        found = bench_handoff.run(worker=self.worker, lengths=[512], runs=2, progress=self.progress)
        for mover in ("grpc", "shm"):
            yield row("handoff", f"step beside it ({mover})", found["step"][mover]["ratio"], "<=", _HANDOFF_STEP)

    def peer_engines(self) -> Iterator[Row]:
        """Other engines, those that are here."""
        found = bench_peers.run(
            worker=self.worker, given={}, where=self.peers, only=[*find({}, self.peers)], drafters=("ngram", "eagle3"),
            batches=(1, 8), prompts=None, num_prompts=4, max_tokens=64, runs=1, progress=self.progress,
        )  # fmt: skip
        for floor in found["floors"]:
            yield row("peers", f"batch {floor['batch']}, to {floor['peer']}", floor["ratio"], ">=", floor["wanted"])
        for name in found["missing"]:
            self.progress(f"{name} is not installed here: nothing is said of it")

    def _decode(self, drafters: tuple[str, ...], *, vs_transformers: bool, **more: Any) -> dict[str, Any]:
        return bench_decode.run(
            drafters=drafters, vs_transformers=vs_transformers, worker=self.worker, handoff="direct", runs=2,
            progress=self.progress, **{"prompts": None, **more},
        )  # fmt: skip


SECTIONS: Mapping[str, Callable[[Short], Iterator[Row]]] = {
    "decode": Short.decode, "repetitive": Short.repetitive, "step": Short.step, "router": Short.router,
    "mixed": Short.mixed, "stream": Short.stream, "handoff": Short.handoff, "peers": Short.peer_engines,
}  # fmt: skip


def run(*, worker: dict[str, Any], only: list[str], peers: str, progress: Progress) -> dict[str, Any]:
    """The sections ``only`` names (empty: all), one after the other. A section that cannot run here says so
    (``left_out``). Raises ConfigError."""
    for name in only:
        if name not in SECTIONS:
            raise unknown_name("section", name, tuple(SECTIONS), field="--only")
    short, rows, left_out, seconds = Short(worker, peers, progress), list[Row](), dict[str, str](), dict[str, float]()
    for name in only or SECTIONS:
        began = time.perf_counter()
        try:
            rows += SECTIONS[name](short)
        except ConfigError as error:
            left_out[name] = str(error)
            progress(f"{name} is left out: {error}")
        seconds[name] = time.perf_counter() - began
        progress(f"{name}: {seconds[name]:.0f} s")
    return {"ok": all(one["ok"] for one in rows), "rows": rows, "left_out": left_out, "seconds": seconds}
