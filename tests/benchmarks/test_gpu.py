"""The calls of benchmarks/gpu.sh rehearsed on a CPU, and what travels to a machine without network."""

import argparse
import csv
import importlib
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.common import performance_tables as tables
from benchmarks.experiments import miniature as experiment
from benchmarks.gpu import goals, miniature, pack, parts, plan, session, unpack
from benchmarks.speed import numerics
from lavis_evlgen.errors import UserError
from lavis_evlgen.nn import MergeMap
from tests.benchmarks.test_experiments import pretend
from tests.processes import forked


def forked_launch(command: list[str], seconds: float, log) -> int | None:
    """A measurement in a fork of this process, which has imported everything."""

    def call():
        sys.argv = command
        importlib.import_module(command[0]).main()

    with forked(call, log) as process:
        try:
            return process.wait(seconds)
        except AssertionError:
            return None


@pytest.fixture
def compiled_by_nothing(monkeypatch):
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiler(module, backend="eager", **how))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")


# the other scripts have tests of their own in test_speed.py; vision has no small size
REHEARSED = {1: ("step-opt-2.7b-compiled", "merge"), 2: ("numerics-opt-2.7b", "ranks-opt-2.7b"), 3: ("miniature",)}


def test_three_calls_from_start_to_end_and_again(compiled_by_nothing, tmp_path, monkeypatch, capsys):
    for module in (experiment, miniature):
        monkeypatch.setattr(module, "train", pretend)
    results, archive = tmp_path / "results", tmp_path / "all.tar.gz"
    for number, names in REHEARSED.items():
        monkeypatch.setitem(plan.CALLS, number, [one for one in plan.CALLS[number] if one.name in names])
        words = [str(number), "--tiny", "--device", "cpu", "--out", str(results), "--archive", str(archive)]
        code = session.main(words, forked_launch)
        assert code == 0, (results / "gpu-cpu.json").read_text()
        for name in names:
            card = json.loads((results / f"{name}-cpu.json").read_text())
            assert {"versions", "commit", "hardware", "date"} <= set(card)
        capsys.readouterr()
        assert session.main(words, None) == 0  # nothing is launched
        assert f"{len(names)} of {len(names)} made before" in capsys.readouterr().out
    ledger = json.loads((results / "gpu-cpu.json").read_text())
    made = [name for names in REHEARSED.values() for name in names]
    assert sorted(ledger) == sorted(made) and {entry["state"] for entry in ledger.values()} == {"done"}
    with tarfile.open(archive) as packed:
        assert {f"{name}-cpu.json" for name in made} < set(packed.getnames())
    step, ranks = (json.loads((results / f"{name}-cpu.json").read_text())["rows"][0] for name in
                   ("step-opt-2.7b-compiled", "ranks-opt-2.7b"))  # fmt: skip
    assert set(step["seconds"]) == {"whole", "compile"} and ranks["loss_difference"] < 1e-6
    compared = json.loads((results / "miniature-cpu.json").read_text())
    assert set(compared["results"]) == set(experiment.CONNECTORS) and compared["steps"] == 2


class _Parsed(Exception):
    """Carries what a script's parser made of its words."""


@pytest.mark.parametrize("tiny", (False, True))
def test_every_script_understands_its_options(tiny, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, words=None):
        raise _Parsed(parse(parser, words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    planned = [one for number in plan.CALLS for one in plan.calls(number, tiny)]
    assert len({one.name for one in planned}) == len(planned)
    for one in planned:
        monkeypatch.setattr(sys, "argv", [one.module, *one.options, "--device", "cpu", "--out", "x.json"])
        with pytest.raises(_Parsed) as found:
            importlib.import_module(one.module).main()
        args = found.value.args[0]
        assert args.device == "cpu" and str(args.out) == "x.json" and one.limit <= (1800 if tiny else 570)
        if hasattr(args, "scale"):
            assert args.scale == "tiny" if tiny else one.name.startswith(f"{one.name.split('-')[0]}-{args.scale}")


def test_what_fails_is_recorded_and_tried_again_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "hardware_name", lambda device: "some-gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    names = ("breaks", "hangs", "works")
    monkeypatch.setitem(plan.CALLS, 1, [plan.Measurement(name, name, (), limit=60) for name in names])
    begun, problem = [], {"breaks": 3, "hangs": None, "works": 0}

    def launch(command, seconds, log):
        begun.append(command[0])
        log.write_text("first\n\nRuntimeError: no kernel\n")
        if problem[command[0]] == 0:
            with open(command[-1], "w") as out:
                json.dump({"commit": {"sha": "abc"}}, out)
        return problem[command[0]]

    words = ["1", "--device", "cuda", "--out", str(tmp_path)]
    assert session.main(words, launch) == 1 and begun == list(names)
    ledger = json.loads((tmp_path / "gpu-some-gpu.json").read_text())
    assert {name: entry["state"] for name, entry in ledger.items()} == {
        "breaks": "failed", "hangs": "failed", "works": "done",
    }  # fmt: skip
    assert ledger["breaks"]["error"] == "exit code 3\nfirst\nRuntimeError: no kernel"
    assert ledger["hangs"]["error"].startswith("ran past 60 s")
    assert "not made: breaks, hangs" in capsys.readouterr().out
    problem["hangs"] = 0
    monkeypatch.setitem(plan.CALLS, 1, [*plan.CALLS[1], plan.Measurement("new", "works", ())])
    assert session.main(words, launch) == 1 and begun[3:] == ["works", "breaks", "hangs"]
    assert session.main([*words, "--seconds", "1"], launch) == 1 and len(begun) == 6
    assert json.loads((tmp_path / "gpu-some-gpu.json").read_text())["breaks"]["state"] == "no time"


def test_a_process_is_ended_with_its_children_at_its_limit(tmp_path):
    started = time.monotonic()
    command = ["timeit", "-n", "1", "-r", "1", "import subprocess; subprocess.run(['sleep', '60'])"]
    assert session.launch(command, 1, tmp_path / "log") is None
    assert time.monotonic() - started < 30
    assert session.launch(["compileall", "-h"], 30, tmp_path / "log") == 0 and "usage" in (tmp_path / "log").read_text()


def test_a_rehearsal_keeps_away_from_measured_results(capsys):
    for words, told in ((["1", "--tiny", "--out", str(session.RESULTS)], "a rehearsal's figures"),
                        (["1", "--device", "cpu"], "sees no CUDA device")):  # fmt: skip
        with pytest.raises(SystemExit):
            session.arguments(words)
        assert told in capsys.readouterr().err


def test_two_gpus_are_not_asked_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "hardware_name", lambda device: "some-gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(plan.CALLS, 1, [plan.Measurement("both", "both", (), gpus=2)])
    assert session.main(["1", "--device", "cuda", "--out", str(tmp_path)], None) == 0
    assert json.loads((tmp_path / "gpu-some-gpu.json").read_text())["both"]["error"] == "needs 2 GPUs, 1 here"


def test_figures_beside_the_goals(tmp_path):
    phases = {name: {"median": seconds} for name, seconds in
              (("vision encoder", 0.6), ("connector, forward", 0.1), ("connector, backward", 0.3))}  # fmt: skip
    row = {"scale": "opt-2.7b", "compile": ["vision", "connector"], "images_per_s": 411.4, "mfu": 0.438,
           "memory_gb": {"whole": 31.25}, "phases": phases}  # fmt: skip
    assert goals.connector_share(row) == pytest.approx(0.4)
    (tmp_path / "step-opt-2.7b-compiled-nvidia-h200.json").write_text(json.dumps({"rows": [row]}))
    line = "| opt-2.7b | vision and connector | 411 | >= 380 | 43.8% | >= 40% | 40.0% | < 15% | 31.2 |"
    table = goals.goals_table(tmp_path, "nvidia-h200")
    assert line in table and "989 TFLOPs" in table
    assert goals.goals_table(tmp_path, "cpu") == "no step measured yet"


def test_a_commit_for_what_travelled_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "COMMIT", tmp_path / "commit.json")
    assert session.with_commit({"commit": {"version": None}}) == {"commit": {"version": None}}
    (tmp_path / "commit.json").write_text('{"sha": "abc", "dirty": false}')
    assert session.with_commit({"commit": {"version": None}})["commit"]["sha"] == "abc"
    assert session.with_commit({"commit": {"sha": "here"}})["commit"]["sha"] == "here"


def test_steps_that_fit():
    timed = {"common": 0.1, "costly": 0.4, "beside": 10.0}
    # 7 runs, 3 at a time: 3 rounds of twice 10 seconds; 5 common steps and a costly one, shared by 3
    assert miniature.steps_that_fit(timed, 540, 3, 10_000) == int((540 * 0.85 - 60) / (0.9 / 3))
    assert miniature.steps_that_fit(timed, 540, 3, 1000) == 1000
    assert miniature.steps_that_fit(timed, 60, 3, 1000) < miniature.LEAST_STEPS
    assert set(miniature.TIMED) < set(experiment.CONNECTORS)
    assert {label: setting.start for label, setting in miniature.chosen_on_cpu().items()}[experiment.BLIND] == "no body"


def test_no_photos_is_an_error_with_its_fix(tmp_path):
    with pytest.raises(UserError, match="gpu_pack.sh --photos packs them"):
        miniature.photos(tmp_path)


def test_pairs_that_two_maps_merge():
    one = MergeMap(torch.tensor([[0, 1, 1, 2, 2, 2]]), 3)  # pairs 12, 34, 35, 45
    other = MergeMap(torch.tensor([[0, 1, 1, 2, 2, 1]]), 3)  # pairs 12, 15, 25, 34
    assert numerics.pairs_that_agree(one, one) == 1
    assert numerics.pairs_that_agree(one, other) == pytest.approx(2 / 6)
    assert numerics.pairs_that_agree(*[MergeMap.identity(1, 4)] * 2) == 1


def test_half_precision_against_float32(tmp_path, monkeypatch):
    scale = numerics.scales()["tiny"]
    args = SimpleNamespace(device="cpu", batch=3)
    rows = numerics.measure(scale, args)
    assert [row["dtype"] for row in rows] == ["bf16", "fp16"]
    for row in rows:
        assert 0 < row["loss_difference"] < 0.02 and 0 < row["pairs_that_agree"] <= 1
        assert set(row["gradient_differences"]) == {"ln_vision", "input_proj", "connector", "llm_proj"}
    device, batch = torch.device("cpu"), numerics.samples(scale, 3, torch.device("cpu"))
    exact, same = (numerics.passed(numerics.build(scale, "fp32", device), "fp32", batch, device) for _ in range(2))
    row = numerics.difference(exact, same, "fp32")
    assert row["loss_difference"] == 0 and not any(row["gradient_differences"].values())
    assert row["pairs_that_agree"] == 1


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=4), st.integers(20_000, 40_000))
def test_files_cut_and_joined(sizes, limit):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"file{n}" for n in range(len(sizes))]
        for path, size in zip(files, sizes, strict=True):
            path.write_bytes(bytes(n % 251 for n in range(size)))
        for part in parts.cut(files, folder, limit):
            assert sum(path.stat().st_size for path in part.iterdir()) <= limit
        (folder / "joined").mkdir()
        manifest = unpack.arrived_parts(folder) if any(sizes) else None
        for path in files if manifest else ():
            joined = parts.join(manifest, path.name, folder / "arrived", folder / "joined")
            assert joined.read_bytes() == path.read_bytes()


def test_what_has_not_arrived_or_is_damaged(tmp_path):
    whole = tmp_path / "photos.tar"
    whole.write_bytes(b"0123456789" * 10_000)
    first, second, third = parts.cut([whole], tmp_path, 40_000)
    third.rename(tmp_path / "later")
    manifest = unpack.arrived_parts(tmp_path)
    assert unpack.unpack(tmp_path, manifest) == {"photos.tar": [3]}
    (tmp_path / "later").rename(third)
    (piece,) = third.glob("photos.tar.*")
    good = piece.read_bytes()
    piece.write_bytes(b"x" + good[1:])
    with pytest.raises(ValueError, match="photos.tar.2 is damaged: send part3 again"):
        unpack.unpack(tmp_path, unpack.arrived_parts(tmp_path))


def test_photos_travel(tmp_path, capsys, monkeypatch):
    (tmp_path / "images").mkdir()
    for n in range(4):
        Image.effect_noise((320, 256), 60).save(tmp_path / f"images/{n}.png")
    lines = ["image,caption", *(f'{n}.png,"noise, {word}"' for n in range(5) for word in ("grey", "loud"))]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    monkeypatch.setattr(pack, "DISTRIBUTIONS", ("braceexpand",))
    monkeypatch.setattr(pack, "WEIGHTS", ("braceexpand",))
    words = ["--photos", str(tmp_path / "images"), "--captions", str(tmp_path / "captions.txt")]
    pack.main([*words, "--out", str(tmp_path / "gpu"), "--mb", "0.06"])
    assert "4 photos" in capsys.readouterr().out and not (tmp_path / "gpu/whole").exists()
    monkeypatch.setattr(unpack, "problem_of_imports", lambda folder: None)
    monkeypatch.setitem(unpack.STAND_INS, "no_such_module", {"no_such_module/__init__.py": ""})
    assert unpack.main(["--folder", str(tmp_path / "gpu"), "--need", "all"]) == 0
    assert "ready for all calls" in capsys.readouterr().out
    assert (tmp_path / "gpu/site/braceexpand/__init__.py").exists()
    assert [path.name for path in (tmp_path / "gpu/stand_ins").iterdir()] == ["no_such_module"]
    images, captions, count = miniature.photos(tmp_path / "gpu")
    assert count == 4 and {Image.open(path).size for path in images.iterdir()} == {(280, 224)}
    with open(captions, newline="") as file:
        assert list(csv.DictReader(file))[1] == {"image": "0.jpg", "caption": "noise, loud"}
    assert "sha" in json.loads((tmp_path / "gpu/commit.json").read_text())


def test_what_cannot_travel_is_refused(tmp_path):
    with pytest.raises(UserError, match="no-such-package is not installed"):
        list(pack.files_of("no-such-package"))
    with pytest.raises(UserError, match="compiled for this Python alone"):
        list(pack.files_of("PyYAML"))
    (tmp_path / "captions.csv").write_text("file,text\n")
    with pytest.raises(UserError, match="columns image and caption"):
        pack.captioned(tmp_path / "captions.csv")


def test_tables_of_the_page():
    rows = [{"dtype": "bf16", "loss": 4.01, "loss_fp32": 4.0, "loss_difference": 0.0025, "pairs_that_agree": "nan",
             "gradient_differences": {"connector": 0.1, "llm_proj": 0.01}}]  # fmt: skip
    text = tables.numerics_table({"rows": rows, "settings": {"scale": "tiny", "batch": 2}})
    assert "| bf16 | 4.0100 | 4.0000 | 0.25% | nan | 10.00% | 1.00% |" in text
    time_of = {"median": 0.1, "low": 0.1, "high": 0.1}
    same = {"scale": "tiny", "batch": 2, "dtype": "fp32"}
    rows = [{**same, "ranks": 2, "seconds": {"alone": time_of, "together": time_of},
             "images_per_s": {"alone": 20.0, "together": 40.0}, "loss_difference": 0.0}]  # fmt: skip
    assert "| 2 | 100 (100 to 100) | 100 (100 to 100) | 40 | 1.00x | 0e+00 |" in tables.ranks_table({"rows": rows})
