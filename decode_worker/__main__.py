"""``python -m decode_worker``: a decode worker without Ray."""

from decode_worker.service import launch
from pdspec.engine.standalone import run_worker

if __name__ == "__main__":
    run_worker("decode", launch)
