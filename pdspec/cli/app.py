"""The ``pdspec`` command: one file per command beside this one; here they get their names.

Logs and progress go to stderr; stdout holds the answer, or with ``--json`` exactly one object.
"""

from __future__ import annotations

import os
import signal
import sys

import typer

from pdspec.cli import (
    bench,
    bench_load,
    chaos,
    chaos_faults,
    chaos_life,
    chaos_pressure,
    check,
    data,
    demo,
    doctor,
    down,
    drafters,
    generate,
    http,
    models,
    plan,
    plan_calibrate,
    plan_traces,
    scale,
    study,
    study_cells,
    study_training,
    top,
    trace,
    train,
    train_card,
    train_data,
    up,
)
from pdspec.errors import PdspecError

USER_ERROR = 2


def build_app() -> typer.Typer:
    """The command tree."""
    app = typer.Typer(
        name="pdspec",
        help="Serve a language model with prefill and decode on different workers and speculative decoding.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("up")(up.up)
    app.command("down")(down.down)
    app.command("generate")(generate.generate)
    app.command("trace")(trace.trace)
    app.command("http")(http.http)
    app.command("top")(top.top)
    app.command("drain")(scale.drain)
    app.command("scale")(scale.scale)
    app.command("doctor")(doctor.doctor)
    app.command("demo")(demo.demo)
    group = _group("The names that --model takes; their weights for other engines.", {"export": models.export})
    group.callback(invoke_without_command=True)(models.models)
    group.info.no_args_is_help = False
    app.add_typer(group, name="models")
    app.command("drafters")(drafters.drafters)
    heads = {name: train.head(name, summary) for name, summary in train.FAMILIES.items()}
    trained = {"data": train_data.data, **heads, "card": train_card.card}
    app.add_typer(_group("Train draft heads on answers that the target itself writes.", trained), name="train")
    app.add_typer(_group("Public prompt sets.", {"fetch": data.fetch}), name="data")
    proofs = {
        "parity": check.parity, "handoff": check.handoff, "lossless": check.lossless, "structured": check.structured,
        "drafter": check.drafter, "plan": check.plan, "tp": check.tp,
    }  # fmt: skip
    app.add_typer(_group("Proofs, run on this machine.", proofs), name="check")
    faults = {
        "kill-decode": chaos_faults.kill_decode, "detect": chaos_faults.detect, "fuzz": chaos.fuzz, "tls": chaos.tls,
        "pressure": chaos_pressure.pressure, "overload": chaos_pressure.overload,
        "drain": chaos_life.drain, "soak": chaos_life.soak,
    }  # fmt: skip
    group = _group("Faults, bad peers and bad input.", faults)
    group.callback(invoke_without_command=True)(chaos_faults.chaos)
    group.info.no_args_is_help = False
    app.add_typer(group, name="chaos")
    predicted = {
        "calibrate": plan_calibrate.calibrate, "simulate": plan_traces.simulate, "sweep": plan_traces.sweep,
    }  # fmt: skip
    group = _group("Predictions.", predicted)
    group.callback(invoke_without_command=True)(plan.plan)
    group.info.no_args_is_help = False
    app.add_typer(group, name="plan")
    measured = {
        "decode": bench.decode, "handoff": bench.handoff, "stream": bench.stream, "budget": bench.budget,
        "peers": bench_load.peers, "router": bench_load.router, "mixed": bench_load.mixed, "step": bench_load.step,
        "short": bench_load.short, "prefix": bench.prefix,
    }  # fmt: skip
    app.add_typer(_group("Measurements.", measured), name="bench")
    compared = {name: study.comparison(name, *rest) for name, rest in study.COMPARISONS.items()}
    stepped = {name: study.stepping(name, *rest) for name, rest in study.STEPPINGS.items()}
    training = {"ttt": study_training.ttt, "draft-vocab": study_training.draft_vocab}
    cells = {"run": study_cells.run, "report": study_cells.report}
    studies = {
        **cells, "acceptance": study.acceptance, **compared, **stepped, "sparse": study.sparse,
        "wire-kv": study.wire_kv, **training,
    }  # fmt: skip
    app.add_typer(_group("Comparisons.", studies), name="study")
    return app


def main() -> None:
    """Run the command line. A user's error is one line on stderr and exit status 2, never a traceback. A command that
    is told to end stops what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        build_app()()
    except PdspecError as error:
        if os.environ.get("PDSPEC_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except BrokenPipeError:  # the reader of stdout went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _group(help: str, commands: dict) -> typer.Typer:
    group = typer.Typer(help=help, no_args_is_help=True, pretty_exceptions_enable=False)
    group.callback()(lambda: None)  # keeps the command's name even when it is the only one
    for name, command in commands.items():
        group.command(name)(command)
    return group
