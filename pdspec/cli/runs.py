"""What every command that decodes prompts has in common: the worker's flags, which prompts, how long the answers.

    @shared_options(num_prompts=16, max_tokens=64)
    def acceptance(temperatures: ... = "0,1", *, shared: Shared) -> None: ...

puts the options behind the command's own, and hands them over as one value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from pdspec.cli.options import Dtype, Heads, Json, Model, Numerics, Options, Prompts, Threads, given_flags
from pdspec.errors import ConfigError

Command = Callable[..., None]
_NumPrompts = Annotated[int, typer.Option(min=1, help="Prompts taken from the file.")]
_Workload = Annotated[
    str, typer.Option(help="Prompts by name instead: repetitive, code, math, chat, …, mtbench, humaneval.")
]
_MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of each answer.")]
_WORKER: dict[str, Any] = {
    "model": Model, "dtype": Dtype, "numerics": Numerics, "head": Heads, "option": Options, "threads": Threads,
}  # fmt: skip
_FLAGS = {"head": "heads", "option": "options"}  # where the worker's key has another name


@dataclass(frozen=True, kw_only=True)
class Shared:
    """``worker`` holds the keys of a WorkerConfig that were given."""

    worker: dict[str, Any]
    prompts: str | None
    workload: str
    num_prompts: int
    max_tokens: int
    json: bool

    def asked(self) -> dict[str, Any]:
        """What is decoded, as studies take it. Raises ConfigError for prompts that are named twice."""
        prompts = self.prompts
        if self.workload:
            if prompts:
                raise ConfigError("prompts are named twice", field="--workload", remedy="give it or --prompts")
            from pdspec.study.workloads import workload

            prompts = workload(self.workload)
        return {"prompts": prompts, "num_prompts": self.num_prompts, "max_tokens": self.max_tokens}


def shared_options(*, num_prompts: int, max_tokens: int) -> Callable[[Command], Command]:
    """Adds the options to a command that takes ``shared``; the two numbers are their defaults."""

    def decorate(command: Command) -> Command:
        def flat(**given: Any) -> None:
            flags = {_FLAGS.get(name, name): given.pop(name) for name in _WORKER}
            kept = {name: given.pop(name) for name in ("prompts", "workload", "num_prompts", "max_tokens", "json")}
            command(shared=Shared(worker=given_flags(**flags), **kept), **given)

        values: list[tuple[str, Any, Any]] = [(name, kind, None) for name, kind in _WORKER.items()]
        values += [("prompts", Prompts, None), ("workload", _Workload, ""), ("num_prompts", _NumPrompts, num_prompts)]
        values += [("max_tokens", _MaxTokens, max_tokens), ("json", Json, False)]
        return with_options(command, "shared", values, flat)

    return decorate


def with_options(command: Command, taken: str, values: Sequence[tuple[str, Any, Any]], run: Command) -> Command:
    """``run`` under name, text and options of ``command``, without the argument ``taken``. Behind them stand those of
    ``values``: name, type and default of each."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own if one.name != taken]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in values
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
