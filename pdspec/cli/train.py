"""``pdspec train``: draft heads, trained on answers that the target itself wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pdspec.cli.options import Json, Threads, default_model
from pdspec.cli.output import only_json, print_json
from pdspec.errors import ConfigError


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
        tokens: Annotated[int, typer.Option(help="Answer tokens that the target writes.")] = 300_000,
        max_answer: Annotated[int, typer.Option(help="Tokens of one answer.")] = 400,
        self_share: Annotated[float, typer.Option(help="Share of samples whose question the target makes up.")] = 0.6,
        passes: Annotated[float | None, typer.Option(help="Over the data (default: 3, unless --minutes).")] = None,
        minutes: Annotated[float, typer.Option(help="Of training, instead of --passes.")] = 0.0,
        ttt: Annotated[int, typer.Option(help="Steps of training-time test.")] = 4,
        draft_vocab: Annotated[int, typer.Option(help="Size of the draft vocabulary.")] = 4096,
        tied_output: Annotated[
            bool, typer.Option("--tied-output", help="eagle3: the target's output rows serve, none are learnt.")
        ] = False,
        hidden: Annotated[int, typer.Option(help="draft-model: its width (0: 128 at most).")] = 0,
        layers: Annotated[int, typer.Option(help="draft-model: its decoder layers.")] = 4,
        learning_rate: Annotated[float, typer.Option()] = 6e-4,
        batch: Annotated[int, typer.Option(help="Samples of one step.")] = 8,
        max_length: Annotated[int, typer.Option(help="Tokens of one sample.")] = 768,
        seed: Annotated[int, typer.Option()] = 0,
        threads: Threads = None,
        loss: Annotated[
            str, typer.Option(help="From the target's distribution: cross-entropy | kl | total-variation.")
        ] = "cross-entropy",
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

            config = TrainConfig(
                model=model or default_model(), out=out, prompts=tuple(prompts or ()), holdout=holdout, tokens=tokens,
                max_answer=max_answer, self_share=self_share, minutes=minutes,
                passes=0.0 if minutes > 0 else 3.0 if passes is None else passes,
                ttt=ttt, draft_vocab=draft_vocab, tied_output=tied_output, hidden=hidden, layers=layers, learning_rate=learning_rate, batch=batch,
                max_length=max_length,
                seed=seed, threads=threads or 0, loss=loss, precision=precision, head=head, recount=recount,
                data=tuple(data or ()), work=work,
                keep_hidden=keep_hidden, resume=resume,
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
