"""``pdspec train``: draft heads, trained on answers that the target itself wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pdspec.cli.options import Json, Threads, default_model
from pdspec.cli.output import only_json, print_json
from pdspec.errors import ConfigError

USUAL: dict[str, Any] = {"tokens": 300_000, "max_answer": 400, "passes": 3.0, "ttt": 4}
QUICK: dict[str, Any] = {"tokens": 40_000, "max_answer": 256, "passes": 8.0, "ttt": 3}


def _choices(what: str, name: str) -> str:
    return f"{what} (default: {USUAL[name]:g}, with --quick {QUICK[name]:g})."


def head(family: str, summary: str) -> Callable[..., None]:
    """The command ``pdspec train <family>``."""

    def command(
        out: Annotated[Path, typer.Option(help="Folder of the trained head.")],
        model: Annotated[str | None, typer.Option(help="The target; see `pdspec models`.")] = None,
        prompts: Annotated[
            list[Path] | None,
            typer.Option(help="JSON lines of prompts to answer; may be repeated (default: the target asks itself)."),
        ] = None,
        holdout: Annotated[int, typer.Option(help="Last prompts of each file, never trained on.")] = 100,
        tokens: Annotated[
            int | None, typer.Option(help=_choices("Answer tokens that the target writes", "tokens"))
        ] = None,
        max_answer: Annotated[int | None, typer.Option(help=_choices("Tokens of one answer", "max_answer"))] = None,
        self_share: Annotated[float, typer.Option(help="Share of samples whose question the target makes up.")] = 0.6,
        passes: Annotated[
            float | None, typer.Option(help=_choices("Over the data, unless --minutes", "passes"))
        ] = None,
        minutes: Annotated[float, typer.Option(help="Of training, instead of --passes.")] = 0.0,
        ttt: Annotated[int | None, typer.Option(help=_choices("Steps of training-time test", "ttt"))] = None,
        quick: Annotated[
            bool, typer.Option("--quick", help="A small head in under ten minutes on two cores: data, training, card.")
        ] = False,
        draft_vocab: Annotated[int, typer.Option(help="Size of the draft vocabulary.")] = 4096,
        intermediate: Annotated[
            int, typer.Option(min=0, help="Width of a new head's MLP; 0: the target's.")
        ] = 0,
        tied_output: Annotated[
            bool, typer.Option("--tied-output", help="eagle3: the target's output rows serve, none are learnt.")
        ] = False,
        layers: Annotated[int, typer.Option(help="draft-model: its decoder layers.")] = 2,
        learning_rate: Annotated[float, typer.Option()] = 6e-4,
        batch: Annotated[int, typer.Option(help="Samples of one step.")] = 8,
        max_length: Annotated[int, typer.Option(help="Tokens of one sample.")] = 768,
        seed: Annotated[int, typer.Option()] = 0,
        threads: Threads = None,
        loss: Annotated[
            str, typer.Option(help="From the target's distribution: cross-entropy | kl | total-variation.")
        ] = "cross-entropy",
        optimiser: Annotated[
            str, typer.Option(help="adamw | muon (for hidden matrices; adamw for the rest).")
        ] = "adamw",
        precision: Annotated[
            str, typer.Option(help="Of matrix products: auto (bfloat16 where the CPU has it), float32, bfloat16.")
        ] = "auto",
        head: Annotated[Path | None, typer.Option(help="Start from this head instead of a new one.")] = None,
        recount: Annotated[
            bool, typer.Option("--recount", help="With --head: choose its draft vocabulary anew, from --data.")
        ] = False,
        data: Annotated[list[Path] | None, typer.Option(help="Token stores made before; may be repeated.")] = None,
        keep_hidden: Annotated[
            bool, typer.Option("--keep-hidden", help="Store hidden rows instead of computing them at each use.")
        ] = False,
        work: Annotated[Path | None, typer.Option(help="Data, state and log (default: OUT/work).")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in WORK was cut.")] = False,
        json: Json = False,
    ) -> None:
        if passes is not None and minutes > 0:
            raise ConfigError("given beside --passes", field="--minutes", remedy="give one of them")
        with only_json(json):
            from pdspec.train.loop import TrainConfig, train

            sizes = QUICK if quick else USUAL
            given = {"tokens": tokens, "max_answer": max_answer, "passes": passes, "ttt": ttt}
            given = {name: value for name, value in given.items() if value is not None}
            length = {"passes": 0.0} if minutes > 0 else {}
            config = TrainConfig(
                model=model or default_model(), out=out, prompts=tuple(prompts or ()), holdout=holdout,
                self_share=self_share, minutes=minutes, draft_vocab=draft_vocab, intermediate=intermediate,
                tied_output=tied_output,
                layers=layers, learning_rate=learning_rate, batch=batch, max_length=max_length,
                seed=seed, threads=threads or 0, loss=loss, optimiser=optimiser, precision=precision, head=head,
                recount=recount, data=tuple(data or ()), work=work, keep_hidden=keep_hidden or quick, resume=resume,
                **{**sizes, **given, **length},
            )  # fmt: skip
            card = train(family.replace("-", "_"), config)
        if json:
            print_json({"out": str(out), "card": card})
        else:
            print(out)

    command.__doc__ = summary
    return command


FAMILIES = {
    "eagle3": "An EAGLE-3 head: three fused levels, trained on its own outputs (training-time test).",
    "eagle1": "An EAGLE-1 head (eagle2 drafts with it, too): the target's next feature and token.",
    "medusa": "Medusa heads: residual blocks on the target's last hidden state.",
    "mtp": "MTP modules in series, teacher-forced.",
    "draft-model": "A small decoder with the target's tokens, distilled from it.",
}
