#!/usr/bin/env bash
# Build or refresh the project's environment in .venv, in the versions of requirements.lock, from any working directory.
#
#   bash run_scripts/setup_environment.sh            all that the lock lists: extras quickstart and dev
#   bash run_scripts/setup_environment.sh NAME...    these extras instead, in the versions of the lock
#   bash run_scripts/setup_environment.sh --transformers VERSION [NAME...]    with another transformers than the lock's
#   bash run_scripts/setup_environment.sh --latest [NAME...]    the newest versions that setup.py and the index allow;
#                                                    run_scripts/make_lock.py then records them in requirements.lock
#
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

latest='' transformers=''
case ${1:-} in
--latest) latest=1 && shift ;;
--transformers) transformers=${2:?which version of transformers?} && shift 2 ;;
esac
environment=${UV_PROJECT_ENVIRONMENT:-.venv}

if [ -n "$latest" ]; then
    # uv, because plain pip cannot lift the stale pins in LAVIS's metadata (see pyproject.toml)
    [ $# -gt 0 ] || set -- quickstart dev
    uv sync --upgrade "${@/#/--extra=}"
    echo "environment $environment has the newest versions ($((SECONDS - started)) s)"
    exit
fi

# uv picks the Python itself: any 3.10-3.12 on the machine (requires-python), else one it fetches
[ -x "$environment/bin/python" ] || uv venv "$environment"

lock=requirements.lock
if [ -n "$transformers" ]; then
    lock=$(mktemp --suffix .txt)
    trap 'rm -f "$lock"' EXIT
    grep -vE '^(transformers|tokenizers|huggingface-hub)==' requirements.lock >"$lock" # what depends on its version
fi
if [ $# -gt 0 ]; then
    wanted=(--editable ".[$(IFS=, && echo "$*")]" --constraint "$lock")
else
    # as overrides too: else those of pyproject.toml would take the place of the lock's versions
    wanted=(--no-deps --requirement "$lock" --override "$lock")
fi

# decord's wheel says inside that it is for CPython 3.6, so uv would reinstall it every time, under the feet of
# whatever runs; an installation that would do nothing else, or only this package again, is skipped. What is installed
# is known without the index; --offline makes that quick.
plan() {
    uv pip install --python "$environment" --dry-run "$@" 2>&1
}
changes=$(plan --offline "${wanted[@]}") || changes=$(plan "${wanted[@]}") ||
    fail "uv cannot install the versions of requirements.lock: $changes"
if grep -E '^ [-+~] ' <<<"$changes" | grep -qvE '^ ~ decord==|^ [-+~] lavis-evlgen( |==)'; then
    uv pip install --python "$environment" "${wanted[@]}"
fi
if [ -n "$transformers" ]; then
    # without --no-config the project's override of transformers would win over the version asked for
    uv pip install --python "$environment" --no-config "transformers==$transformers"
fi
command=$environment/bin/evlgen # as new as the last installation of this package
if [ ! -x "$command" ] || [ setup.py -nt "$command" ] || [ pyproject.toml -nt "$command" ]; then
    uv pip install --python "$environment" --no-deps --editable .
fi
echo "environment $environment is up to date ($((SECONDS - started)) s)"
