#!/usr/bin/env bash
# Run the tests; arguments go to pytest.
#
#   bash run_scripts/test.sh             in .venv
#   bash run_scripts/test.sh --oldest    in .venv-oldest, with the oldest transformers supported
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OLDEST_TRANSFORMERS=4.49.0

environment=.venv
if [ "${1:-}" = --oldest ]; then
    shift
    environment=.venv-oldest
fi
export UV_PROJECT_ENVIRONMENT=$environment
bash run_scripts/setup_environment.sh
if [ "$environment" = .venv-oldest ]; then
    export PATH="$PATH:$HOME/.local/bin"
    # without --no-config the project's override of transformers would win over the version asked for
    uv pip install --no-config --python "$environment/bin/python" "transformers==$OLDEST_TRANSFORMERS"
fi
exec "$environment/bin/python" -m pytest "$@"
