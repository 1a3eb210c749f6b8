"""Other ranks of a worker as threads of the test's own process: they share nothing with rank 0 but the interpreter."""

from __future__ import annotations

import threading
from pathlib import Path

from pdspec.parallel.follower import Follower


class RankThread:
    """See ``pdspec.parallel.ranks.Started``."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(folder, rank), name=f"rank-{rank}", daemon=True)
        self._thread.start()

    def _run(self, folder: Path, rank: int) -> None:
        try:
            Follower(folder, rank).serve()
        except BaseException as error:
            self.failure = error
            raise

    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive() and self.failure is None, self.failure
