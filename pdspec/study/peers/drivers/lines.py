"""What every driver shares: requests as JSON lines on stdin, answers on stdout; what libraries print goes to stderr.

Drivers are run by a peer's own interpreter, which knows nothing of this project: they use the standard library and the
peer alone.

    {"op": "load", "model": folder, "gguf": file, "threads": 2, "batch": 16, "context": 1024, "mode": "plain"}
        -> {"versions": {...}, "settings": {...}}
    {"op": "generate", "prompts": [[ids], ...], "max_tokens": 128}
        -> {"tokens": [[ids], ...], "first_s": 0.05, "seconds": 1.2}

``seconds`` run from the request to the last token of all prompts, ``first_s`` to the moment at which each has one.
"""

import importlib.metadata
import json
import os
import sys
import traceback


def serve(load):
    """Answer requests until stdin ends. ``load(request)`` returns (generate, settings), and ``generate(prompts,
    max_tokens)`` returns (tokens, first_s, seconds)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "load":
                generate, settings = load(request)
                answer = {"settings": settings}
            else:
                tokens, first, seconds = generate(request["prompts"], request["max_tokens"])
                answer = {"tokens": tokens, "first_s": first, "seconds": seconds}
        except Exception as error:  # noqa: BLE001  whatever it is, the other end is told
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def versions(*packages):
    """Those that are installed, by name."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
