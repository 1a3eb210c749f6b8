"""``python -m pdspec.parallel FOLDER RANK``: a rank as a child process of rank 0; it ends with its standard input."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from pdspec.errors import PdspecError
from pdspec.parallel.follower import Follower
from pdspec.parallel.group import RankLost
from pdspec.parallel.sharing import SETTINGS
from pdspec.telemetry import setup_logging


def main() -> int:
    """Serve until rank 0 is gone. 2: settings that cannot work."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with_input, name="watch", daemon=True).start()
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    name = f"{settings['worker_id'] or settings['role']}/{rank}"
    setup_logging(settings["log_level"], name=name, log_format=settings["log_format"])
    try:
        Follower(folder, rank).serve()
    except PdspecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"error: rank {rank}: {error}", file=sys.stderr)
        return 70
    return 0


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a thread may still wait for rank 0
