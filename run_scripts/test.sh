#!/usr/bin/env bash
# Run the tests, side by side on all processor cores; arguments go to pytest, which then runs on one.
#
#   bash run_scripts/test.sh                           in .venv
#   bash run_scripts/test.sh --oldest                  in .venv-oldest, with the oldest transformers supported
#   bash run_scripts/test.sh --transformers VERSION    in .venv-transformers-VERSION, with that one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OLDEST_TRANSFORMERS=4.49.0

environment=.venv version=()
case ${1:-} in
--oldest)
    environment=.venv-oldest version=(--transformers "$OLDEST_TRANSFORMERS")
    shift
    ;;
--transformers)
    version=(--transformers "${2:?which version of transformers?}")
    environment=.venv-transformers-$2
    shift 2
    ;;
esac
UV_PROJECT_ENVIRONMENT=$environment bash run_scripts/setup_environment.sh "${version[@]}"
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then # each process would compile 4,000 files anew, for longer than it runs
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX=$PWD/$environment/pycache
fi
[ $# -gt 0 ] || set -- --numprocesses auto --dist loadfile # what a file's tests share is built once
exec "$environment/bin/python" -m pytest "$@"
