"""``pdspec plan calibrate``: the step times that the simulator takes, measured here."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated

import typer

from pdspec.cli.options import Dtype, Heads, Json, Model, Numerics, Options, Prompts, Threads, given_flags
from pdspec.cli.output import notes, only_json, print_json
from pdspec.errors import ConfigError


def calibrate(
    out: Annotated[Path | None, typer.Option(help="Write the table here, for --times.")] = None,
    drafter: Annotated[str, typer.Option(help="Whose steps.")] = "eagle3",
    tree: Annotated[str, typer.Option(help="Default: the family's.")] = "",
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    option: Options = None,
    threads: Threads = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts taken from the file.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 64,
    batches: Annotated[str, typer.Option(help="Sequences at once, ascending, comma separated.")] = "1,2,4,8",
    json: Json = False,
) -> None:
    """Prefill, decode steps by batch, handoff and acceptance of real workers, for `plan simulate --times`."""
    with only_json(json):
        from pdspec.study.heads import worker_config
        from pdspec.study.simulator.calibrate import calibrate as run
        from pdspec.study.ways import prompt_ids

        given = given_flags(model=model, dtype=dtype, numerics=numerics, heads=head, options=option, threads=threads)
        config = worker_config(given, ("none", drafter))
        sizes = [int(part) for part in batches.split(",")]
        times = run(
            config, prompt_ids(config, prompts, num_prompts), drafter=drafter, tree=tree, batches=sizes,
            tokens=max_tokens, progress=notes().print,
        )  # fmt: skip
    result = {"times": times.to_json(), "kv_tokens": config.cache_tokens}
    if out is not None:
        try:
            out.write_text(json_.dumps(result), encoding="utf-8")
        except OSError as error:
            message = f"cannot write {out}: {error.strerror}"
            raise ConfigError(message, field="--out", remedy="name a file in a folder that exists") from error
    if json:
        print_json(result)
    elif out is None:
        print(json_.dumps(result))
