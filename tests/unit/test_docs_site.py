"""The docs site builds without a warning, and the pages written from the code have every command and key."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pdspec.cli.reference import reference, settings_page
from tests.documented import ROOT


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {path.parent.name for path in tmp_path.glob("*/index.html")}
    assert pages >= {"architecture", "tuning", "metrics", "checkpoints", "adding-a-drafter", "security", "cli"}
    assert "--draft-prefill" in (tmp_path / "cli" / "index.html").read_text()


def test_every_command_and_setting_is_on_its_page():
    page = reference()
    for title in ("pdspec up", "pdspec generate PROMPT", "pdspec check drafter NAME", "pdspec models export"):
        assert f"## `{title}`\n" in page
    assert "| `--plugin` |" in page and "| `--transformers`, `--no-transformers` | `True` |" in page
    keys = settings_page()
    assert "| `cache_tokens` | `65536` |" in keys and "| `client_ca` |" in keys and "(auto \\| grpc \\| shm)" in keys
