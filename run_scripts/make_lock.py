"""Write requirements.lock: the versions that `setup_environment.sh --latest` resolved, which it installs otherwise.

    bash run_scripts/setup_environment.sh --latest && uv run --no-sync python run_scripts/make_lock.py

Plain pip, which cannot lift LAVIS's stale pins, can install this list too, without looking at dependencies:

    pip install --no-deps -r requirements.lock && pip install --no-deps -e .

The list holds names and versions only (no host, no hash), so it works with any package index. Where
Python 3.10, 3.11 and 3.12 need different versions, a line says which Python it is for. All markers
about the platform go: the list is for Linux on x86-64, as pyproject.toml says.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ["--no-extra=wandb", "--no-extra=trackio"]  # setup.py: TRACKERS
EXPORT = ["uv", "export", "--quiet", "--all-extras", *LEFT_OUT, "--no-hashes", "--no-emit-project"]
PLAIN = ["--no-annotate", "--no-header"]
PLATFORM = re.compile(r"\s*(?:and\s+)?(?:platform_machine|sys_platform) == '[^']*'")
LINE = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+( ; python_full_version [<>=!]=? '[\d.*]+')?")
HEADER = """\
# Made by run_scripts/make_lock.py; do not edit. Linux x86-64, Python 3.10-3.12:
#   pip install --no-deps -r requirements.lock && pip install --no-deps -e .
"""


def lock_lines(exported: str) -> list[str]:
    """`name==version[ ; python marker]` for each exported line; an odd line is an error, never dropped."""
    lines = []
    for line in exported.splitlines():
        line = PLATFORM.sub("", line).strip().removesuffix(";").strip()
        if not LINE.fullmatch(line):
            raise SystemExit(f"make_lock: `uv export` gave {line!r}, not name==version: fix LINE here.")
        lines.append(line)
    return lines


def main() -> None:
    exported = subprocess.run(EXPORT + PLAIN, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = lock_lines(exported)
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(f"requirements.lock: {len(lines)} lines\n")


if __name__ == "__main__":
    main()
