"""How the ranks of one worker talk: gloo over the loopback, which they find through a file that only their user reads.

Two groups, because two threads of the first rank speak at once:

    steps   its engine thread: the inputs of a forward to all, partial sums among all
    pages   whoever reads or writes KV rows (handoffs, copies): one rank at a time, each with an answer
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HOST = "127.0.0.1"
SUM_TIMEOUT = datetime.timedelta(seconds=120)  # one layer of one chunk on the slowest rank
MEET_TIMEOUT = datetime.timedelta(seconds=60)  # all have loaded
FOREVER = datetime.timedelta(days=365)  # a rank waits for its next command
STORE = "rendezvous"
GROUPS = ("steps", "pages")


class RankLost(Exception):
    """Another rank of this worker is gone or stands still. No request's error: the worker cannot go on."""


class Group:
    """One group of all ranks; rank 0 leads. Every method blocks without the GIL, and raises RankLost,
    as does making one when the others do not come."""

    def __init__(self, folder: Path, name: str, rank: int, ranks: int) -> None:
        gloo: Any = dist.ProcessGroupGloo  # its stubs lack the options
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=HOST)]
        options._timeout = MEET_TIMEOUT
        self.rank, self.ranks = rank, ranks
        store = dist.PrefixStore(name, store_of(folder))
        try:
            self._group: Any = gloo(store, rank, ranks, options)
        except RuntimeError as error:
            raise RankLost(_said(error)) from error
        self._group._set_default_timeout(FOREVER)

    def close(self) -> None:
        """Close the connections: whoever waits at their other end gets RankLost. Nothing may follow."""
        self._group = None

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's ``tensor`` into that of every other rank, of the same shape and type, on the CPU."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        _wait(lambda: self._group.broadcast([tensor], options))
        return tensor

    def add_up(self, tensor: torch.Tensor) -> None:
        """The sum over all ranks, float32, into every rank's ``tensor``. From a GPU it goes through host memory."""
        here = tensor if tensor.device.type == "cpu" else tensor.cpu()
        options = dist.AllreduceOptions()
        options.timeout = SUM_TIMEOUT
        _wait(lambda: self._group.allreduce([here], options))
        if here is not tensor:
            tensor.copy_(here)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """To one rank."""
        _wait(lambda: self._group.send([tensor], to, 0))

    def receive(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """What that rank sends, into ``tensor``."""
        _wait(lambda: self._group.recv([tensor], source, 0))
        return tensor


def store_of(folder: Path) -> dist.FileStore:
    """Where ranks find each other. The file stays until its folder is removed."""
    return dist.FileStore(str(folder / STORE), -1)


def _wait(begin: Callable[[], Any]) -> None:
    try:
        begin().wait()
    except RuntimeError as error:
        raise RankLost(_said(error)) from error


def _said(error: RuntimeError) -> str:
    return str(error).splitlines()[0][:300]
