"""What simulated workers take: values, measured (``calibrate``) or modelled (``of_plan``), and kept as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pdspec.errors import ConfigError
from pdspec.study.plan.advice import Setting
from pdspec.study.plan.drafts import DraftCost
from pdspec.study.plan.roofline import Roofline

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
Chances = tuple[float, ...]  # [j]: that a verification puts out j + 1 tokens


@dataclass(frozen=True, kw_only=True)
class WorkerTimes:
    """Seconds, bytes, tokens.

    ``step_s`` [b] is a whole decode step of ``batches[b]`` sequences, drafts and all, but for its ``kv_token_s`` for
    each token of KV that it reads. A prefill step of ``count`` tokens of a prompt from position ``start`` on takes
    ``chunk_s + count · token_s + count · (start + count / 2) · pair_s``. ``request_s`` is from arrival to the decode
    worker's queue and back to the client with the first token. ``speeds`` as in ``events.Machine``. ``chances`` has a
    row for each measured answer; a simulated one draws a row for itself.
    """

    batches: tuple[int, ...]
    step_s: tuple[float, ...]
    kv_token_s: float
    chunk_s: float
    token_s: float
    pair_s: float = 0.0
    request_s: float = 0.0
    handoff_s: float = 0.0  # from the first token to the next step, beside the bytes
    kv_token_bytes: float = 0.0  # that cross the handoff, drafter's included
    link: float = 0.0  # bytes per second of one prefill worker; 0: without limit
    layers: int = 1
    chances: tuple[Chances, ...] = ((1.0,),)
    speeds: tuple[float, ...] = (1.0,)
    source: str = ""

    @cached_property
    def _steps(self) -> list[float]:
        """By batch, 0 first: straight lines between the measured ones, and on past the last."""
        top = 4 * self.batches[-1]
        own = np.interp(np.arange(top + 1), self.batches, self.step_s)
        if len(self.batches) > 1:
            slope = (self.step_s[-1] - self.step_s[-2]) / (self.batches[-1] - self.batches[-2])
            own[self.batches[-1] :] += slope * np.arange(top + 1 - self.batches[-1])
        return own.tolist()

    def step(self, batch: int, kv_tokens: float) -> float:
        """A decode step."""
        own = self._steps[batch] if batch < len(self._steps) else self._steps[-1] * batch / len(self._steps)
        return own + kv_tokens * self.kv_token_s

    def prefill(self, work: Sequence[tuple[int, int]]) -> float:
        """A prefill step of (start, count) of several prompts."""
        return self.chunk_s + sum(count * (self.token_s + (start + count / 2) * self.pair_s) for start, count in work)

    @property
    def expected_tokens(self) -> float:
        """Of a verification, on average over the rows of ``chances``."""
        return float(np.mean([sum((j + 1) * chance for j, chance in enumerate(row)) for row in self.chances]))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WorkerTimes:
        """What ``to_json`` gave. Raises ConfigError."""
        try:
            known = {field.name for field in dataclasses.fields(cls)}
            plain = {name: _tuples(value) for name, value in values.items() if name in known}
            return cls(**plain)
        except TypeError as error:
            raise ConfigError(
                f"no table of step times: {error}", field="--times", remedy="write one with `pdspec plan calibrate`"
            ) from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, (list, tuple)) else value


def of_plan(target: Roofline, cost: DraftCost, setting: Setting, alpha: float) -> WorkerTimes:
    """Of a roofline: the setting's drafts at every batch, whatever it was chosen for."""
    depth = setting.nodes
    steps = [cost.draft_s(depth) + target.forward_s(batch * (1 + depth)) for batch in BATCHES]
    chunk, read = 2048, target.shape.read_bytes(2048) / (target.hardware.read * target.devices)
    one, two = target.prefill_s(chunk, chunk) - target.overhead_s, target.prefill_s(2 * chunk, chunk)
    pair = max(0.0, (two - 2 * target.overhead_s - 2 * one) / (chunk * chunk))
    survival = [alpha**d for d in range(depth + 1)] + [0.0]
    return WorkerTimes(
        batches=BATCHES, step_s=tuple(np.maximum.accumulate(steps).tolist()),
        kv_token_s=target.shape.kv_bytes / (target.hardware.read * target.devices),
        chunk_s=target.overhead_s, token_s=max(one, read) / chunk - pair * chunk / 2, pair_s=pair,
        request_s=2e-3, handoff_s=1e-3, kv_token_bytes=target.shape.kv_bytes + cost.kv_bytes,
        link=target.hardware.link * target.devices, layers=target.shape.config.num_layers,
        chances=(tuple(survival[d] - survival[d + 1] for d in range(depth + 1)),),
        source=f"roofline of {target.shape.config.name} on {target.devices} x {target.hardware.name}",
    )  # fmt: skip


def steps_of(chances: np.ndarray, tokens: int, random: np.random.Generator) -> int:
    """Verifications that ``tokens`` tokens take, drawn; ``chances`` as a row of ``WorkerTimes.chances``."""
    if tokens <= 0:
        return 0
    if len(chances) == 1:
        return tokens
    done = np.cumsum(1 + np.searchsorted(np.cumsum(chances)[:-1], random.random(tokens)))
    return int(np.searchsorted(done, tokens)) + 1
