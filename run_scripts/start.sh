#!/usr/bin/env bash
# Run a command from the repository's root, in the environment that is active, else in .venv; DRY_RUN=1 prints it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
    exit
fi
[ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ] && source .venv/bin/activate
exec "$@"
