#!/usr/bin/env bash
# Run a command in the project's environment, from the repository's root; DRY_RUN=1 prints it instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
    exit
fi
[ -f .venv/bin/activate ] && source .venv/bin/activate
exec "$@"
