#!/bin/sh
# deploy/one-box.sh [flags of `pdspec up`]        a whole deployment on this machine, in the background
#
# Installs into .venv where that is missing, starts router, relay, HTTP front, a prefill and a decode worker, and returns
# when they answer. `pdspec down` ends all of it.
set -eu
cd "$(dirname "$0")/.."
PDSPEC=${PDSPEC:-.venv/bin/pdspec}
command -v "$PDSPEC" > /dev/null || make setup
"$PDSPEC" up --config deploy/one-box.yaml --detach "$@"
echo "to end it: $PDSPEC down" >&2
