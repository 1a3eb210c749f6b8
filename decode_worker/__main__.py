"""``python -m decode_worker``: a decode worker without Ray."""

from pdspec.engine.standalone import run_worker

if __name__ == "__main__":
    run_worker("decode")
