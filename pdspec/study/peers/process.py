"""A peer as a process: this end of the lines that ``drivers/lines.py`` answers."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pdspec.errors import PdspecError, PeerLost
from pdspec.study.peers.find import KINDS, environment

_DRIVERS = Path(__file__).parent / "drivers"
_STOP_S, _ANSWER_S = 20.0, 600.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a peer is to hold. ``model`` is a checkpoint folder, ``gguf`` the same weights as one file."""

    model: str
    gguf: str
    threads: int
    batch: int  # prompts at once, at most
    context: int  # tokens of one prompt with its answer
    mode: str = "plain"  # or "lookup": the peer's own prompt lookup


@dataclass(frozen=True, kw_only=True)
class Took:
    """Answers of prompts that were given at once. ``first_s``: each has a token; ``seconds``: all are done."""

    tokens: tuple[tuple[int, ...], ...]
    first_s: float
    seconds: float

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first of each."""
        later = sum(len(answer) - 1 for answer in self.tokens)
        return later / (self.seconds - self.first_s)

    @property
    def throughput(self) -> float:
        """Tokens per second, prompts included in the time."""
        return sum(map(len, self.tokens)) / self.seconds


class PeerProcess:
    """One peer with its model loaded, until the block ends. Raises PeerLost when it cannot be started or breaks off,
    PdspecError for what its engine refuses. ``script`` stands in for the peer's driver."""

    def __init__(self, name: str, python: str, load: Load, script: Path | None = None) -> None:
        self.name, self.load = name, load
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in stop
        command = [python, str(script or _DRIVERS / KINDS[name].script)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment()
        )
        self.settings: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self.settings = self._ask({"op": "load", **vars(self.load)})["settings"]
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Took:
        """Greedy answers of exactly ``max_tokens`` tokens, to all prompts at once."""
        answer = self._ask({"op": "generate", "prompts": [list(ids) for ids in prompts], "max_tokens": max_tokens})
        tokens = tuple(tuple(ids) for ids in answer["tokens"])
        return Took(tokens=tokens, first_s=answer["first_s"], seconds=answer["seconds"])

    def stop(self) -> None:
        """End the process. Safe to repeat."""
        assert self._process.stdin and self._process.stdout
        if not self._process.stdin.closed:
            self._process.stdin.close()  # a driver ends with its input
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], _ANSWER_S)
            line = self._process.stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise PeerLost(f"{self.name} broke off: {self._log.read()[-800:]}", remedy="see what it wrote")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PdspecError(f"{self.name}: {answer['error']}", remedy="see the driver in pdspec/study/peers/drivers")
        return answer
