"""A rank other than the first: it owns its part of the weights and of the KV pages, and does what rank 0 says.

    steps thread   hear batch, hear layers ─▶ own part of each layer, add up
    pages thread   hear a page operation ─▶ do it, answer

It knows nothing of requests, sequences or drafts. When rank 0 goes, both threads end.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from pdspec.cache.paged import PagedCache
from pdspec.config import WorkerConfig
from pdspec.model.batch import ForwardBatch
from pdspec.model.files import resolve
from pdspec.model.loader import load_weights
from pdspec.model.native import NativeOps
from pdspec.model.native_layers import check_sizes
from pdspec.model.ops import make_ops, make_rope
from pdspec.model.runner import make_layers, run_layers
from pdspec.model.split import split
from pdspec.parallel.group import GROUPS, Group, RankLost, store_of
from pdspec.parallel.messages import Kind, PageCall, hear, hear_batch
from pdspec.parallel.sharing import SETTINGS, device_of, ready_key, threads_of

log = logging.getLogger(__name__)


class Follower:
    """Made from the settings that rank 0 left in ``folder``; ``serve`` blocks until rank 0 is gone. Raises ConfigError
    and CheckpointError as rank 0 does, and RankLost."""

    def __init__(self, folder: Path, rank: int) -> None:
        config = WorkerConfig.from_mapping(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        files = resolve(config.model, config.cache_dir or None)
        self._ops = make_ops(device_of(config, rank), threads_of(config))
        part = split(files.config, config.tp)[rank]
        own = part.config(files.config)
        if isinstance(self._ops, NativeOps):
            check_sizes(own)
        self._eps, self._rope = own.rms_norm_eps, make_rope(
            head_dim=own.rope_dim, theta=own.rope_theta, max_positions=own.max_context, scaling=own.rope_scaling,
            device=self._ops.device,
        )  # fmt: skip
        weights = part.take(files.config, load_weights(files, config.dtype))
        self._layers = make_layers(own, weights, self._ops, self._rope, config.dtype)
        group = own.target_group(config.dtype)
        self._cache, self._name = PagedCache((group,), config.pages(), config.page_size, self._ops.device), group.name
        store_of(folder).set(ready_key(rank), "1")
        self._steps, self._pages = (Group(folder, name, rank, config.tp) for name in GROUPS)
        self._pages.send(torch.ones(1, dtype=torch.uint8), 0)  # the rendezvous may go

    def serve(self) -> None:
        """Until rank 0 goes. Whatever else ends one thread is raised here, and ends the rank."""
        ends: list[BaseException] = []
        over = threading.Event()

        def run(loop: Callable[[], None]) -> None:
            try:
                loop()
            except BaseException as error:  # noqa: BLE001  raised below
                ends.append(error)
            over.set()

        for loop in (self._run_steps, self._run_pages):
            threading.Thread(target=run, args=(loop,), name=loop.__name__, daemon=True).start()
        over.wait()
        self._ops.close()
        if not isinstance(ends[0], RankLost):
            raise ends[0]
        log.debug("rank 0 is gone")

    def _run_steps(self) -> None:
        batch: ForwardBatch | None = None
        x = torch.empty(0)
        with torch.inference_mode():
            while True:
                header = hear(self._steps)
                if header[0] == Kind.BATCH:
                    batch, x = hear_batch(self._steps, header)
                    x = x.to(self._ops.device)
                    continue
                if batch is None:
                    raise ValueError("layers without a batch")
                _, first, last, *_ = header
                run_layers(
                    self._layers[first:last], self._ops, self._eps, batch, self._cache.group(self._name)[first:last],
                    x, add_up=self._steps.add_up,
                )  # fmt: skip

    def _run_pages(self) -> None:
        while True:
            call = PageCall.hear(self._pages)
            answer = torch.ones(1, dtype=torch.uint8)
            match call.kind:
                case Kind.READ:
                    rows = bytearray(self._cache.read_rows(
                        self._name, call.layer, call.numbers, call.start, call.stop, call.head_start, call.head_count
                    ))  # fmt: skip
                    answer = torch.frombuffer(rows, dtype=torch.uint8)
                case Kind.WRITE:
                    self._write(call)
                case Kind.COPY_ROWS:
                    count, rest = call.numbers[0], call.numbers[1:]
                    pages, rows_both = rest[:count], rest[count:]
                    half = len(rows_both) // 2
                    self._cache.copy_rows(self._name, pages, rows_both[:half], rows_both[half:])
                case Kind.COPY_PAGE:
                    self._cache.copy_page(self._name, *call.numbers)
                case Kind.POISON:
                    self._cache.poison(self._name, call.numbers, call.start, call.stop)
                case _:
                    raise ValueError(f"{call.kind!r} is no page operation")
            self._pages.send(answer, 0)

    def _write(self, call: PageCall) -> None:
        layout = self._cache.layout(self._name)
        size = (call.stop - call.start) * call.head_count * layout.row_bytes // layout.num_kv_heads
        data = self._pages.receive(torch.empty(size, dtype=torch.uint8), 0)
        self._cache.write_rows(
            self._name, call.layer, call.numbers, call.start, call.stop, data.numpy().data, call.head_start,
            call.head_count,
        )  # fmt: skip
