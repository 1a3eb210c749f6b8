"""``python -m prefill_worker``: a prefill worker without Ray."""

from pdspec.engine.standalone import run_worker
from prefill_worker.service import launch

if __name__ == "__main__":
    run_worker("prefill", launch)
