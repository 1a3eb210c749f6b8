"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdspec.errors import ConfigError
from pdspec.train.divergence import LOSSES
from pdspec.train.optimisers import OPTIMISERS


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. ``tokens`` target-written answer tokens are generated unless they are there already.

    Exactly one of ``passes`` (over the data) and ``minutes`` (of training, generation not counted) is above 0;
    ``steps`` above 0 stand for ``passes``.
    ``head`` starts from a head that exists; ``data`` names stores made elsewhere (nothing is then generated).
    """

    model: str = "smollm2-135m"
    out: Path
    prompts: tuple[Path, ...] = ()
    holdout: int = 100  # the last prompts of each file, kept for evaluation
    tokens: int = 300_000
    self_share: float = 0.6
    passes: float = 3.0
    minutes: float = 0.0
    steps: int = 0
    ttt: int = 4
    draft_vocab: int = 4096
    recount: bool = False  # with ``head``: choose its draft vocabulary anew, by ``draft_vocab`` and the data
    layers: int = 2  # draft-model: decoder layers, the target's to begin with
    intermediate: int = 0  # width of a new head's MLP; 0: the target's
    tied_output: bool = False  # eagle3: no output rows of its own, the target's serve; a larger draft vocabulary fits
    learning_rate: float = 6e-4
    warmup: float = 0.03  # share of the run
    batch: int = 8  # samples per step
    max_length: int = 768  # tokens of a sample
    seed: int = 0
    threads: int = 0
    loss: str = "cross-entropy"  # between draft and target: see divergence.py
    optimiser: str = "adamw"  # | muon (hidden matrices): see optimisers.py
    precision: str = "auto"  # of matrix products: auto (bfloat16 where the CPU has units for it) | float32 | bfloat16
    resume: bool = False
    head: Path | None = None
    data: tuple[Path, ...] = ()
    work: Path | None = None
    cache_dir: str | None = None
    keep_hidden: bool = False  # hidden rows are kept beside the tokens; else computed whenever a sample is used
    max_answer: int = 400  # tokens of a generated answer
    generation_batch: int = 32
    evaluate: int = 24  # answers to prompts never trained on, to measure acceptance on; 0: none
    max_steps: int = 0  # stop (not anneal) after this many steps in all; 0: no limit

    def __post_init__(self) -> None:
        if (self.passes > 0) == (self.minutes > 0):
            raise ConfigError("give passes or minutes, not both", field="minutes", remedy="set the other to 0")
        if self.optimiser not in OPTIMISERS:
            raise ConfigError(
                f"unknown optimiser {self.optimiser!r}", field="optimiser", remedy="choose " + " | ".join(OPTIMISERS)
            )
        if self.loss not in LOSSES:
            raise ConfigError(f"unknown loss {self.loss!r}", field="loss", remedy="choose " + " | ".join(LOSSES))

    @property
    def work_folder(self) -> Path:
        """Where data and state go."""
        return self.work or self.out / "work"
