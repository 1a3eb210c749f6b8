"""``python -m prefill_worker``: a prefill worker without Ray."""

from pdspec.engine.standalone import run_worker

if __name__ == "__main__":
    run_worker("prefill")
