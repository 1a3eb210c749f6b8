"""The first rank's hold on the others: it starts them, waits for them, sees whether they live, and ends them.

A rank that dies ends the worker (crash-only): a forward that waits for it raises RankLost, and ``alive`` turns False.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError
from pdspec.model.config import ModelConfig
from pdspec.model.ops import Ops, make_ops
from pdspec.model.split import split
from pdspec.parallel.cache import ShardedCache
from pdspec.parallel.group import GROUPS, Group, RankLost, store_of
from pdspec.parallel.runner import ParallelRunner
from pdspec.parallel.sharing import SETTINGS, device_of, ready_key, refuse_what_one_rank_cannot, threads_of
from pdspec.types import CacheGroup

log = logging.getLogger(__name__)
START_TIMEOUT_S = 300.0
_POLL_S, _STOP_S = 0.02, 10.0


class Started(Protocol):
    """Another rank, wherever it runs."""

    def alive(self) -> bool:
        """False is final."""

    def stop(self) -> None:
        """End it. Safe to repeat."""


StartRank = Callable[[Path, int], Started]  # rendezvous folder, rank


class RankProcess:
    """A rank as a child process. Its standard input is a pipe that nobody writes to: it ends when this process does,
    however that comes about."""

    def __init__(self, folder: Path, rank: int) -> None:
        command = [sys.executable, "-m", "pdspec.parallel", str(folder), str(rank)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2)

    def alive(self) -> bool:
        """See ``Started``."""
        return self.process.poll() is None

    def stop(self) -> None:
        """See ``Started``."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Ranks:
    """Ranks 1 … tp-1 of ``config``, started at once; they load while this process does. Raises ConfigError for settings
    and models that cannot be shared out."""

    def __init__(self, config: WorkerConfig, model: ModelConfig, start: StartRank = RankProcess) -> None:
        refuse_what_one_rank_cannot(config)
        self.parts = split(model, config.tp)
        self._config, self._model, self._groups = config, model, list[Group]()
        self.folder = Path(tempfile.mkdtemp(prefix="pdspec-tp-"))  # 0700: whoever reads it could join
        self.started: list[Started] = []
        try:
            (self.folder / SETTINGS).write_text(json.dumps(config.to_mapping()), encoding="utf-8")
            for part in self.parts[1:]:
                self.started.append(start(self.folder, part.rank))
        except BaseException:
            self.close()
            raise
        log.info("numerics: fast, because %d ranks add their partial sums in another order than one", config.tp)

    def ops(self) -> Ops:
        """This rank's operations."""
        return make_ops(device_of(self._config, 0), threads_of(self._config))

    def runner(self, weights: dict[str, torch.Tensor], ops: Ops) -> ParallelRunner:
        """The target over all ranks, once all have loaded. Raises ConfigError when one does not."""
        steps, _ = self._connected()
        return ParallelRunner(
            self._model, weights, ops=ops, dtype=self._config.dtype, part=self.parts[0], ranks=steps
        )

    def cache(self, groups: tuple[CacheGroup, ...], device: torch.device) -> ShardedCache:
        """The pages of all ranks, as many and as large as the settings say."""
        _, pages = self._connected()
        config = self._config
        return ShardedCache(
            groups, config.pages(), config.page_size, device, sharded=self._model.target_group(config.dtype).name,
            parts=self.parts, ranks=pages,
        )  # fmt: skip

    def _connected(self) -> list[Group]:
        """The groups ``steps`` and ``pages``."""
        if not self._groups:
            store, ranks = store_of(self.folder), self._config.tp
            deadline = time.monotonic() + START_TIMEOUT_S
            while not store.check([ready_key(rank) for rank in range(1, ranks)]):
                if not self.alive() or time.monotonic() > deadline:
                    message = "a rank of this worker did not start"
                    raise ConfigError(message, field="tp", remedy="see what it wrote to stderr")
                time.sleep(_POLL_S)
            try:
                self._groups = [Group(self.folder, name, 0, ranks) for name in GROUPS]
                for rank in range(1, ranks):  # has met all others
                    self._groups[1].receive(torch.empty(1, dtype=torch.uint8), rank)
            except RankLost as error:
                message = f"no way to a rank of this worker: {error}"
                raise ConfigError(message, field="tp", remedy="try again") from error
            shutil.rmtree(self.folder)  # now, so that a crash leaves nothing
        return self._groups

    def alive(self) -> bool:
        """Whether every rank lives."""
        return all(one.alive() for one in self.started)

    def close(self) -> None:
        """End all ranks. Safe to repeat."""
        for group in self._groups:
            group.close()
        for one in self.started:
            one.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
