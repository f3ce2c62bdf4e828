"""One call of benchmarks/gpu.sh: measurements one after another, each in a process of its own with a limit of its own.

    bash benchmarks/gpu.sh 1                        # then 2 and 3
    EVLGEN_GPU_TINY=1 bash benchmarks/gpu.sh 1      # a rehearsal at tiny sizes, on any machine

A measurement that has its results file is not made again. One that fails is recorded with its error in
gpu-HARDWARE.json and does not stop the others; the next call tries it again, after those not tried yet. None is begun
that the call has no time for. At the end the figures stand beside the goals.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.timing import RESULTS, hardware_name
from benchmarks.gpu.goals import goals_table
from benchmarks.gpu.plan import CALLS, Measurement, calls
from lavis_evlgen.reporting.run_card import write_run_card

ROOT = Path(__file__).resolve().parents[2]
COMMIT = ROOT / "build/gpu/commit.json"  # of gpu_pack.sh: what travels may have no git beside it
LEAST = 45  # seconds: no measurement is begun with less
LAST_LINES = 15
Launch = Callable[[list[str], float, Path], "int | None"]


def launch(command: list[str], seconds: float, log: Path) -> int | None:
    """Run `python -m COMMAND`; its exit code, or None where it ran past `seconds` and was ended with its children."""
    with open(log, "w") as words:
        streams = {"stdin": subprocess.DEVNULL, "stdout": words, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, start_new_session=True, **streams)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Session:
    """The measurements of one call, in one folder of results."""

    def __init__(self, args, launch: Launch = launch):
        self.args, self.launch, self.device = args, launch, torch.device(args.device)
        self.hardware = hardware_name(self.device)
        self.logs = args.out / "logs" / f"gpu-{self.hardware}"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.ledger_file = args.out / f"gpu-{self.hardware}.json"
        self.ledger = json.loads(self.ledger_file.read_text()) if self.ledger_file.exists() else {}
        self.deadline = time.monotonic() + args.seconds

    def results(self, one: Measurement) -> Path:
        return self.args.out / f"{one.name}-{self.hardware}.json"

    def run(self) -> list[str]:
        """Make what is not made yet; the names of those that are still not."""
        planned = calls(self.args.call, self.args.tiny)
        waiting = [one for one in planned if self.args.again or not self.results(one).exists()]
        print(f"call {self.args.call} on {self.hardware}: {len(planned) - len(waiting)} of {len(planned)} made before")
        failed = {name for name, entry in self.ledger.items() if entry["state"] == "failed"}
        for one in sorted(waiting, key=lambda one: one.name in failed):
            self._note(one, self._measure(one))
        left = [one.name for one in planned if not self.results(one).exists()]
        return [name for name in left if self.ledger[name]["state"] != "not possible"]

    def _measure(self, one: Measurement) -> dict:
        """What the ledger says of one measurement, which is made if there is time and hardware."""
        there = torch.cuda.device_count() if self.device.type == "cuda" else one.gpus
        if there < one.gpus:
            return {"state": "not possible", "error": f"needs {one.gpus} GPUs, {there} here"}
        left = self.deadline - time.monotonic()
        if left < LEAST:
            return {"state": "no time", "error": f"{left:.0f} s left of the call's {self.args.seconds:g}"}
        limit, log, out = min(one.limit, left), self.logs / f"{one.name}.log", self.results(one)
        made = out.with_suffix(".partial")
        made.unlink(missing_ok=True)  # of a call that was cut off
        command = [one.module, *one.options, "--device", str(self.device), "--out", str(made)]
        print(f"{one.name}: at most {limit:.0f} s", flush=True)
        started = time.monotonic()
        code = self.launch(command, limit, log)
        took = round(time.monotonic() - started, 1)
        if made.exists():  # written whole, as the last thing: a process that was slow to end has measured all the same
            write_run_card(out, with_commit(json.loads(made.read_text())))
            made.unlink()
            return {"state": "done", "seconds": took}
        reason = f"ran past {limit:.0f} s" if code is None else f"exit code {code}"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {"state": "failed", "seconds": took, "error": "\n".join([reason, *lines[-LAST_LINES:]])}

    def _note(self, one: Measurement, entry: dict):
        """Keep and show what became of a measurement, and write the archive anew: the call may be cut off any time."""
        self.ledger[one.name] = entry
        write_run_card(self.ledger_file, self.ledger)
        took = f" in {entry['seconds']:.0f} s" if "seconds" in entry else ""
        print(f"{one.name}: {entry['state']}{took}", *entry.get("error", "").splitlines(), sep="\n  ", flush=True)
        if self.args.archive:
            self._pack()

    def _pack(self):
        """All results of this hardware and the logs in one file, whole at any time."""
        partial = self.args.archive.with_name(self.args.archive.name + ".partial")
        with tarfile.open(partial, "w:gz") as archive:
            for path in (*sorted(self.args.out.glob(f"*-{self.hardware}.json")), self.logs):
                archive.add(path, path.relative_to(self.args.out))
        partial.replace(self.args.archive)


def with_commit(card: dict) -> dict:
    """The card with the commit that gpu_pack.sh noted, where it was measured outside a git checkout."""
    if "sha" not in card["commit"] and COMMIT.exists():
        return {**card, "commit": json.loads(COMMIT.read_text())}
    return card


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    tiny = os.environ.get("EVLGEN_GPU_TINY") == "1"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("call", type=int, choices=CALLS, help="which of the calls")
    made.add_argument("--out", type=Path, help="folder of the results (benchmarks/results; tiny: output/gpu-tiny)")
    made.add_argument("--seconds", type=float, help="of the whole call (570; tiny: 3600)")
    made.add_argument("--archive", type=Path, help="also keep results and logs in this .tar.gz, whole at any time")
    made.add_argument("--again", action="store_true", help="measure what was measured before too")
    made.add_argument("--tiny", action="store_true", default=tiny, help="a rehearsal; so does EVLGEN_GPU_TINY=1")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = made.parse_args(words)
    args.seconds = args.seconds or (3600 if args.tiny else 570)
    args.out = (args.out or (ROOT / "output/gpu-tiny" if args.tiny else RESULTS)).absolute()
    if args.archive:
        args.archive = args.archive.absolute()
    if args.tiny and args.out == RESULTS:
        made.error(f"--out {args.out}: a rehearsal's figures would stand beside measured ones; name another folder")
    if not args.tiny and args.device == "cpu":
        made.error("torch sees no CUDA device; EVLGEN_GPU_TINY=1 rehearses on a CPU")
    return args


def main(words: list[str] | None = None, launch: Launch = launch) -> int:
    args = arguments(words)
    session = Session(args, launch)
    if args.tiny:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling tiny models takes longer than all the rest
    missing = session.run()
    print(goals_table(args.out, session.hardware))
    print(f"not made: {', '.join(missing)} (call again)" if missing else "all made", f"results in {args.out}", sep="\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
