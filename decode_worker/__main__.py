"""``python -m decode_worker``: a decode worker without Ray."""

from pdspec.engine.standalone import run_worker
from decode_worker.service import launch

if __name__ == "__main__":
    run_worker("decode", launch)
