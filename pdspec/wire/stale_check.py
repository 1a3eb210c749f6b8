"""``python -m pdspec.wire.stale_check``: exit status 1 when the committed stubs are not those of ``proto/``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pdspec.wire.stubs import ROOT, STUBS, generate


def stale_stubs() -> list[str]:
    """Names of the stubs whose committed text differs from what protoc writes now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, committed = Path(folder) / "pdspec/wire", ROOT / "pdspec/wire"
        return [
            name
            for name in STUBS
            if not (committed / name).exists() or (committed / name).read_bytes() != (fresh / name).read_bytes()
        ]


def main() -> int:
    """Print each stale stub and the remedy. Returns the exit status."""
    stale = stale_stubs()
    for name in stale:
        print(f"pdspec/wire/{name} is stale: run `make proto` (python -m pdspec.wire.stubs)", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
