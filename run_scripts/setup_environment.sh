#!/usr/bin/env bash
# Build or refresh the project's environment in .venv, from any working directory.
#
#   bash run_scripts/setup_environment.sh            extras quickstart and dev
#   bash run_scripts/setup_environment.sh NAME...    these extras instead
#
# uv is used because plain pip cannot lift the two stale pins in LAVIS's metadata (see pyproject.toml).
# UV_PROJECT_ENVIRONMENT names another folder than .venv, as for every uv command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS

fail() {
    echo "setup_environment: $1" >&2
    exit 1
}

install_uv() {
    echo "uv is not installed; installing it with pip" >&2
    if python3 -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
        python3 -m pip install uv >&2 && return # inside a virtual environment there is no user site
    elif python3 -m pip --version >/dev/null; then
        python3 -m pip install --user uv >&2 && return
        # Debian and its children refuse even a user install; uv is one file and disturbs nothing there
        echo "pip refused a user install; trying --break-system-packages" >&2
        python3 -m pip install --user --break-system-packages uv >&2 && return
    fi
    echo "pip could not install uv; trying pipx" >&2
    command -v pipx >/dev/null && pipx install uv >&2 && return
    fail "uv could not be installed by pip or pipx: install it by hand (\`pipx install uv\`) and run this again."
}

# user installs land here, and a fresh shell does not always have it on its PATH
export PATH="$PATH:$HOME/.local/bin"
if ! command -v uv >/dev/null; then
    command -v python3 >/dev/null || fail "python3 is not installed: install Python 3.10-3.12 and run this again."
    install_uv
    PATH="$PATH:$(python3 -m site --user-base)/bin:$(python3 -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
    command -v uv >/dev/null || fail "uv was installed but is not on the PATH: add its folder to PATH and run this again."
fi

extras=()
[ $# -gt 0 ] || set -- quickstart dev
for extra in "$@"; do
    extras+=(--extra "$extra")
done

# uv picks the Python itself: any 3.10-3.12 on the machine (requires-python), else one it fetches.
# decord's wheel says inside that it is for CPython 3.6, so uv would reinstall it at every sync, under
# the feet of whatever runs; a sync that would do nothing else is skipped.
environment=${UV_PROJECT_ENVIRONMENT:-.venv}
plan=$(uv sync "${extras[@]}" --dry-run 2>&1) || fail "uv cannot resolve the environment: $plan"
if [ ! -x "$environment/bin/python" ] || grep -E '^ [-+~] ' <<<"$plan" | grep -qv '^ ~ decord=='; then
    uv sync "${extras[@]}"
fi
echo "environment $environment is up to date ($((SECONDS - started)) s)"
