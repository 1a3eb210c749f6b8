"""From a prompt or a scenario to a recording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.model.tokenizer import load_tokenizer
from pdspec.prompting import prompt_ids, to_generate_request
from pdspec.study.viewer.record import Record, record
from pdspec.study.viewer.scenarios import SCENARIOS
from pdspec.types import SamplingParams, UserRequest


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for, and how it is called."""

    title: str
    text: str
    raw: bool
    temperature: float
    seed: int
    drafter: str = ""
    tree: str = ""


def of_scenarios() -> list[Asked]:
    """The two that the page shows where no prompt is given."""
    return [
        Asked(title=one.title, text=one.text, raw=True, temperature=one.temperature, seed=one.seed,
              drafter=one.drafter, tree=one.tree)
        for one in SCENARIOS
    ]  # fmt: skip


def of_prompt(text: str, *, raw: bool, temperature: float, seed: int) -> list[Asked]:
    """One of the user's own."""
    return [Asked(title=text if len(text) < 60 else f"{text[:57]}…", text=text, raw=raw, temperature=temperature,
                  seed=seed)]  # fmt: skip


class Player:
    """A model and its drafters, loaded once. ``worker`` are keys of a WorkerConfig. Raises what loading raises."""

    def __init__(self, worker: dict[str, Any]) -> None:
        config = WorkerConfig.from_mapping(worker)
        self._generator = LocalGenerator(config)
        self._tokenizer = load_tokenizer(config.model, config.cache_dir or None)

    def play(
        self, asked: Asked, *, drafter: str = "", tree: str = "", max_tokens: int, on_step: Callable[[Record], None]
    ) -> dict[str, Any]:
        """The recording, with its title. A scenario's own drafter and tree give way to those named here."""
        known = asked.drafter in self._generator.resources.drafters and not drafter
        drafter, tree = (asked.drafter, tree or asked.tree) if known else (drafter, tree)
        user = UserRequest(
            text=asked.text if asked.raw else None, chat=None if asked.raw else (("user", asked.text),),
            drafter=drafter, tree=tree,
            sampling=SamplingParams(temperature=asked.temperature, seed=asked.seed, max_tokens=max_tokens),
        )  # fmt: skip
        request = to_generate_request(user, prompt_ids(user, self._tokenizer), request_id="trace", seed=asked.seed)
        return {"title": asked.title, **record(self._generator, self._tokenizer, request, on_step=on_step)}
