"""The experiments: small runs of each, and the tables that they write into the docs."""

import argparse
import json
import sys
import types

import pytest
import torch
from PIL import Image

from benchmarks.common import miniature_tables, video_tables
from benchmarks.common.result_pages import END, START
from benchmarks.experiments import (
    ablations,
    adaptive,
    conditioned,
    connectors,
    elastic,
    flickr8k,
    miniature,
    real_clips,
    scst_scenes,
    stage_findings,
    start_effects,
    texts_per_image,
    video_scenes,
)
from lavis_evlgen import launch
from lavis_evlgen.nn.merging import merge_schedule, tokens_after
from lavis_evlgen.tools.sweeps import runs as sweep_runs
from tests.clip_tools import write_clip
from tests.run_tools import ROOT, Runs, log


def scored(right: float, shuffled: float, cider: float = 0.1) -> dict:
    return {"loss_right": right, "loss_shuffled": shuffled, "cider": cider, "blind_cider": 0.05}


FOUND = {
    "TomeFormer": {
        "sweep": [
            {"init_lr": 1e-3, "body": 0.02, "start": "MiniLM", "steps": 100, "val": scored(3.5, 3.6)},
            {"init_lr": 2.5e-3, "body": 0.1, "start": "random", "steps": 100, "val": scored(3.4, 3.6)},
        ],
        "runs": [
            {"name": f"run{n}", "steps": 240, "steps_ahead": 0, "test": scored(right, 3.5, cider), "trains": 11_200_000,
             "seconds": 60.0 * n, "macs": 2e14}
            for n, (right, cider) in enumerate([(3.3, 0.1), (3.2, 0.2), (3.1, 0.3)], 1)
        ],
    },
    "two stages": {
        "sweep": [{"init_lr": 1e-3, "body": 1.0, "start": "MiniLM", "steps": 40, "val": scored(3.7, 3.7)}],
        "runs": [{"name": "x", "steps": 72, "steps_ahead": 224, "test": scored(3.0, 3.0), "trains": 9,
                  "seconds": 7200.0, "macs": 1e12}],
    },
}  # fmt: skip


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]


def test_scores_are_mean_least_and_most_over_seeds():
    header, _, tome, _ = rows(miniature_tables.scores_table(FOUND))
    assert dict(zip(header, tome, strict=True)) == {
        "connector": "TomeFormer", "CIDEr": "0.200 (0.100 to 0.300)", "blind CIDEr": "0.050 (0.050 to 0.050)",
        "loss, right picture": "3.200 (3.100 to 3.300)", "loss, shuffled": "3.500 (3.500 to 3.500)",
        "gap, nats/token": "0.300 (0.200 to 0.400)",
    }  # fmt: skip


def test_an_ablation_has_a_row_for_each_value():
    for left, r in ablations.TOKENS.items():  # the paper's 12 layers; at the last two r a layer's half is the limit
        assert tokens_after(257, merge_schedule(r, 12, 257)) == left
        assert tokens_after(257, merge_schedule({"target": left}, 6, 257)) == left
    runs = [
        {"values": {"model.vit_layer": layer}, "seconds": 60.0 * right, "scores": {
            "CIDEr": 0.1, "blind CIDEr": 0.05, "loss, right": right, "loss, shuffled": 4.0}}
        for layer, right in (("3", 3.0), ("3", 3.5), ("12", 3.0))
    ]  # fmt: skip
    header, _, third, last = rows(ablations.table("vit_layer", runs))
    assert header[0] == "hidden layer" and [third[0], last[0]] == ["3", "12"]
    assert third[3:] == ["3.250 (3.000 to 3.500)", "0.750 (0.500 to 1.000)", "3.25 min"]


def test_costs_count_both_stages():
    _, _, one, two = rows(miniature_tables.costs_table(FOUND))
    assert one == ["TomeFormer", "11.2M", "240", "2 min", "200 T"]
    assert two == ["two stages", "0.0M", "224 + 72", "2 h", "1 T"]


def test_the_rate_taken_is_the_one_in_bold():
    losses = {line[2]: line[5] for line in rows(miniature_tables.sweep_table(FOUND))[2:4]}
    assert losses == {"0.001": "3.500", "0.0025": "**3.400**"}


def measured(order: float, cider: float, **more) -> dict:
    return {"name": "x", "seed": 1, "steps": 240, "cider": cider, "blind_cider": 0.1, "loss_right": 1.0, "trains": 5e6,
            "loss_shuffled": 2.0, "order_accuracy": order, "seconds": 90.0, **more}  # fmt: skip


def test_tables_of_clips(tmp_path):
    kinds = {"order_accuracy left/right": 0.4, "order_accuracy up/down": 0.8}
    found = {"concat": [measured(0.6, 1.0, **kinds), measured(0.8, 2.0, **kinds)], "mean": [measured(0.5, 0.5)]}
    header, _, concat, mean = rows(video_tables.scores_table(found))
    assert header[:3] == ["frames", "order of events", "CIDEr"]
    assert concat[:3] == ["concat", "0.700 (0.600 to 0.800)", "1.500 (1.000 to 2.000)"]
    assert mean[1] == "0.500 (0.500 to 0.500)"
    header, _, concat, mean = rows(video_tables.kinds_table(found))
    assert header[1:] == ["left/right", "up/down"] and concat[2] == "0.800 (0.800 to 0.800)" and mean == ["mean"]
    assert rows(video_tables.costs_table(found))[2] == ["concat", "5.0M", "240", "1.5 min"]
    page = tmp_path / "docs" / "results" / "video.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"# Before\n\n{START}\nold\n{END}\n\nAfter.\n")
    for _ in range(2):
        video_tables.write_page(found, page)
        text = page.read_text()
        assert text.startswith("# Before\n") and text.endswith(f"{END}\n\nAfter.\n") and "old" not in text
        assert text.count("| concat |") == 3
    assert (tmp_path / "docs/images/video_miniature.png").stat().st_size > 5000


@pytest.fixture
def in_this_process(monkeypatch):
    """train.py is not started but called; the names of the runs that were."""
    started = []

    def popen(command, **keys):
        options = command[command.index("--options") + 1 :]
        cfg_path = command[command.index("--cfg-path") + 1]
        assert cfg_path.startswith(f"{ROOT}/projects/")
        started.append(dict(option.split("=", 1) for option in options)["run.run_name"])
        launch.run(argparse.Namespace(cfg_path=cfg_path, options=options), False)
        return types.SimpleNamespace(returncode=0, poll=lambda: 0)

    monkeypatch.setattr(sweep_runs, "subprocess", types.SimpleNamespace(Popen=popen, DEVNULL=None, STDOUT=None))
    return started


def tiny(parts) -> list[str]:
    """Options of a run in seconds."""
    options = [f"model.{key}={path}" for key, path in parts.items()]
    options += ["model.vit_layer=null", "model.image_size=28", "model.num_layers=2", "model.tome_r=4",
                "run.num_workers=0", "run.num_beams=1", "run.max_len=6", "run.tokenizer=simple", "run.log_freq=1",
                "run.amp=false", "run.tensorboard=false", "run.warmup_steps=0", "run.batch_size_train=2",
                "run.blind_shuffles=1", "run.sheet_pictures=0", "model.vit_precision=fp32",
                "model.llm_precision=fp32"]  # fmt: skip
    return options


def test_clips_from_end_to_end_and_again(in_this_process, parts, tmp_path, monkeypatch):
    """Two ways to mix frames and SCST after one, two steps each on tiny parts; a second call finds all of it done."""
    ways = {label: video_scenes.WAYS[label] for label in ("temporal Q-Former", video_scenes.SCST_FROM)}
    monkeypatch.setattr(video_scenes, "WAYS", ways)
    page = tmp_path / "docs" / "results" / "video.md"
    page.parent.mkdir(parents=True)
    page.write_text((ROOT / "docs/results/video.md").read_text())
    arguments = ["--steps", "2", "--seeds", "7", "--clips", "4", "4", "--jobs", "1", "--folder", str(tmp_path / "made")]
    arguments += ["--out", str(tmp_path / "found.json"), "--page", str(page), "--set", *tiny(parts)]
    monkeypatch.setattr(sys, "argv", ["video_scenes.py", *arguments])
    video_scenes.main()
    labels = [*ways, video_scenes.SCST]
    assert len(in_this_process) == len(set(in_this_process)) == 1 + len(labels)
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert set(found) == set(labels) and all(0 <= run["order_accuracy"] <= 1 for (run,) in found.values())
    assert all(run["clips"] == 4 for (run,) in found.values())
    assert "reward" in log(tmp_path / "made" / "runs" / found[video_scenes.SCST][0]["name"])[0]
    card = tmp_path / "made" / "runs" / found[video_scenes.SCST_FROM][0]["name"] / "run.json"
    model = json.loads(card.read_text())["config"]["model"]
    assert model["temporal_positions"] is True and model["residual"] == "convex"
    assert model["pretrained"].endswith("start_2_seed7/checkpoint_last.pth")
    text = page.read_text()
    assert "Not yet run" not in text and text.count("| temporal Q-Former |") == 4
    video_scenes.main()
    assert len(in_this_process) == 1 + len(labels)


def test_scst_beside_cross_entropy_from_end_to_end(in_this_process, parts, tmp_path, monkeypatch):
    page = tmp_path / "scst.md"
    page.write_text((ROOT / "docs/scst.md").read_text())
    arguments = ["--start", "3", "--steps", "2", "--seeds", "7", "8", "--jobs", "1", "--pictures", "4"]
    arguments += ["--arms", "cross-entropy", "SCST, greedy", "--folder", str(tmp_path / "made"), "--page", str(page)]
    arguments += ["--out", str(tmp_path / "found.json"), "--set", *tiny(parts)]
    monkeypatch.setattr(sys, "argv", ["scst_scenes.py", *arguments])
    scst_scenes.main()
    assert len(in_this_process) == 1 + 2 * 2
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert set(found) == {scst_scenes.START, "cross-entropy", "SCST, greedy"}
    assert [run["seed"] for run in found["SCST, greedy"]] == [7, 8]
    for run in found["SCST, greedy"]:
        assert [row["step"] for row in run["windows"]] == [1, 2] and "reward_greedy" in run["windows"][0]
        card = json.loads((tmp_path / "made" / "runs" / run["name"] / "run.json").read_text())
        assert card["config"]["model"]["pretrained"].endswith("start_3/checkpoint_last.pth")
    assert not found["cross-entropy"][0]["windows"] and found["cross-entropy"][0]["words"] > 0
    header, _, start, _, scst = rows(page.read_text().split("<!-- tables -->")[1].split("\n\n")[1])
    assert header[:4] == ["weights", "CIDEr", "blind CIDEr", "words a caption"] and start[-2] == "3"
    assert scst[0] == "SCST, greedy" and " to " in scst[1]
    assert (tmp_path / "images/scst_scenes.png").stat().st_size > 5000


def test_what_keys_of_the_start_do_from_end_to_end(in_this_process, parts, tmp_path, monkeypatch, capsys):
    small = [*tiny(parts), "datasets.scenes.sizes={train: 4, val: 4, test: 0}"]
    monkeypatch.setattr(start_effects, "VARIANTS", {"quickstart": small, "other": [*small, "run.beta2=0.9"]})
    arguments = ["--steps", "2", "--folder", str(tmp_path / "made"), "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["start_effects.py", *arguments])
    start_effects.main()
    assert in_this_process == ["0_seed42_2", "1_seed42_2"]
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert 0 <= found["other"][0]["least_across_picture_share"] <= 1
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if " | " in line][1:] == [
        "| quickstart", "| other"]  # fmt: skip


def photos(folder, per_split: int):
    """A folder of drawn pictures and a captions file that names their splits."""
    folder.mkdir()
    lines = ["image,caption,split"]
    for n in range(3 * per_split):
        Image.new("RGB", (32, 32), (9 * n, 99, 200 - 9 * n)).save(folder / f"{n:02}.jpg")
        lines += [f"{n:02}.jpg,colour {n} {word},{('train', 'val', 'test')[n % 3]}" for word in ("here", "there")]
    file = folder.parent / "captions.csv"
    file.write_text("\n".join(lines))
    return folder, file


def test_photos_frozen_lora_and_full_from_end_to_end(in_this_process, parts, tmp_path, monkeypatch, capsys):
    """Equal time: steps follow the measured step; another seed later joins the first in the table."""
    images, file = photos(tmp_path / "photos", 4)
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs/results/flickr8k.md").read_text())
    monkeypatch.setattr(flickr8k, "TIMING_STEPS", 2)
    monkeypatch.setattr(flickr8k, "median", lambda values: 1.0)
    arguments = ["--images", str(images), "--captions", str(file), "--minutes", str(2 / 60), "--arms", "frozen", "full"]
    arguments += ["--folder", str(tmp_path / "made"), "--out", str(tmp_path / "found.json"), "--page", str(page)]
    for seed in ("7", "8"):
        monkeypatch.setattr(sys, "argv", ["flickr8k.py", *arguments, "--seeds", seed, "--set", *tiny(parts)])
        flickr8k.main()
    runs = [f"{arm}_steps2_seed{seed}" for seed in (7, 8) for arm in ("frozen", "full")]
    assert in_this_process == [f"time{n}_{arm}" for n in (0, 1) for arm in ("frozen", "full")] + runs
    header, _, frozen, full = rows(page.read_text().split("<!-- tables -->")[1].split("\n\n")[1])
    found = [dict(zip(header, row, strict=True)) for row in (frozen, full)]
    assert [row["text, nats/token: before → after"] for row in found][0] == "does not change"
    assert " → " in found[1]["text, nats/token: before → after"] and found[1]["seeds"] == "7, 8"
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert results["frozen"][0]["trains"] < results["full"][0]["trains"] and found[0]["steps"] == "2"
    assert page.read_text().count(".jpg |") == 4  # the four test photos, by name


def test_connectors_from_end_to_end_and_another_seed(in_this_process, parts, tmp_path, monkeypatch):
    """All read the ViT's stored tokens; the table compares each with pooling on the same photos."""
    images, file = photos(tmp_path / "photos", 5)
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs/results/connectors.md").read_text())
    arguments = ["--images", str(images), "--captions", str(file), "--steps", "2", "--language", "frozen"]
    arguments += ["--arms", "pooling29", "first_skip", "--folder", str(tmp_path / "made"), "--page", str(page)]
    arguments += ["--out", str(tmp_path / "found.json")]
    few = ["model.num_query_token=5"]  # this ViT has 17 tokens
    for seed in ("7", "8"):
        monkeypatch.setattr(sys, "argv", ["connectors.py", *arguments, "--seeds", seed, "--set", *tiny(parts), *few])
        connectors.main()
    names = [f"frozen_{arm}_steps2_seed{seed}" for seed in (7, 8) for arm in ("pooling29", "first_skip")]
    assert in_this_process == names
    written = page.read_text().split("<!-- tables of frozen -->")[1].split("\n\n")[1]
    header, _, pooling, ours = rows(written)
    assert len(header) == len(pooling) == len(ours) and pooling[2] == "" and " to " in ours[2]
    assert pooling[-1] == ours[-1] == "7, 8"
    assert "Not yet run." in page.read_text().split("<!-- tables of frozen -->")[0]  # the other language model's
    assert sorted(path.name for path in (tmp_path / "made/features").glob("*train*"))


def test_conditioned_merging_from_end_to_end_and_another_seed(in_this_process, parts, tmp_path, monkeypatch):
    """With and without on the same questions; the table has the gap where there is one."""
    page = tmp_path / "docs" / "results" / "conditioned.md"
    page.parent.mkdir(parents=True)
    page.write_text((ROOT / "docs/results/conditioned.md").read_text())
    small = [option for option in tiny(parts) if not option.startswith(("run.tokenizer", "run.blind_shuffles"))]
    arguments = ["--steps", "2", "--pictures", "4", "--scored", "3", "--jobs", "1", "--folder", str(tmp_path / "made")]
    arguments += ["--out", str(tmp_path / "found.json"), "--page", str(page)]
    for tokens, seed in ((["9", "5"], "7"), (["9"], "8")):
        command = [*arguments, "--tokens", *tokens, "--seeds", seed, "--set", *small, "model.max_txt_len=64"]
        monkeypatch.setattr(sys, "argv", ["conditioned.py", *command])
        conditioned.main()
    assert in_this_process == [f"{condition}_{tokens}_steps2_seed{seed}" for tokens, seed in ((9, 7), (5, 7), (9, 8))
                               for condition in ("none", "question")]  # fmt: skip
    header, _, *found = rows(page.read_text().split("<!-- tables -->")[1].split("\n\n")[1])
    found = [dict(zip(header, row, strict=True)) for row in found]
    assert [(row["tokens"], row["merging"]) for row in found] == [
        (tokens, conditioned.CONDITIONS[condition]) for tokens in ("5", "9") for condition in ("none", "question")
    ]
    plain, question = found[2:]
    assert plain["condition gap"] == plain["less the plain one's (95 %)"] == "" and question["seeds"] == "7, 8"
    assert " to " in question["condition gap"] and " to " in question["less the plain one's (95 %)"]
    assert (tmp_path / "docs/images/conditioned.png").stat().st_size > 5000
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert results["question, 5"][0]["condition"]["questions"] > 6 and "Not yet run" not in page.read_text()


def test_elastic_against_models_of_one_number_from_end_to_end(in_this_process, parts, tmp_path, monkeypatch):
    """Two numbers of tokens: a model each, and both elastic ones, evaluated at either number without training."""
    images, file = photos(tmp_path / "photos", 4)
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs/results/elastic.md").read_text())
    arguments = ["--images", str(images), "--captions", str(file), "--steps", "3", "--budgets", "5", "9"]
    arguments += ["--seeds", "7", "--folder", str(tmp_path / "made"), "--out", str(tmp_path / "found.json")]
    arguments += ["--page", str(page), "--set", *tiny(parts)]
    monkeypatch.setattr(sys, "argv", ["elastic.py", *arguments])
    elastic.main()
    found = json.loads((tmp_path / "found.json").read_text())
    fewer = found["steps"]["elastic, sandwich"]
    assert found["steps"]["elastic, one"] == 3 > fewer >= 1
    trained = ["5_alone_steps3_seed7", "9_alone_steps3_seed7", "elastic_one_steps3_seed7",
               f"elastic_sandwich_steps{fewer}_seed7"]  # fmt: skip
    assert in_this_process == [*trained, *(f"{name}_at5" for name in trained[2:])]
    assert not list((tmp_path / f"made/runs/{trained[2]}_at5").glob("*.pth"))
    header, _, *lines = rows(page.read_text().split("\n\n")[-3])
    assert [line[:2] for line in lines] == [[count, kind] for count in ("5", "9")
                                            for kind in ("alone", "elastic, one", "elastic, sandwich")]  # fmt: skip
    assert all((line[3] == "") == (line[1] == "alone") for line in lines) and " to " in lines[1][3]
    five, nine = (found["results"][f"elastic, one at {count}"][0]["loss_right"] for count in (5, 9))
    assert five != nine
    costs = rows(page.read_text().split("\n\n")[-2])
    assert [line[0] for line in costs[2:]] == ["2 models", "elastic, one", "elastic, sandwich"]
    before = page.read_text()
    elastic.main()
    assert len(in_this_process) == 6 and page.read_text() == before
def test_tokens_by_need_from_end_to_end_and_again(in_this_process, parts, tmp_path, monkeypatch):
    """Fixed and by need, two steps each on tiny parts; a second call finds both done."""
    monkeypatch.setattr(adaptive, "LIMITS", {9: (6, 13)})
    page = tmp_path / "docs" / "results" / "adaptive.md"
    page.parent.mkdir(parents=True)
    page.write_text((ROOT / "docs/results/adaptive.md").read_text())
    small = [option for option in tiny(parts) if not option.startswith("model.tome_r")]
    arguments = ["--averages", "9", "--steps", "2", "--seeds", "7", "--pictures", "12", "--jobs", "1", "--folder"]
    arguments += [str(tmp_path / "made"), "--out", str(tmp_path / "found.json"), "--page", str(page), "--set", *small]
    arguments += ["datasets.scenes.sizes={train: 12, test: 12}", "datasets.scenes.image_size=32"]
    arguments += [f"datasets.scenes.vis_processor.{stage}.image_size=28" for stage in ("train", "eval")]
    monkeypatch.setattr(sys, "argv", ["adaptive.py", *arguments])
    adaptive.main()
    assert in_this_process == ["fixed9_steps2_seed7", "adaptive9_steps2_seed7"]
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    (fixed,), (ours,) = (found[label] for label in ("fixed 9", "adaptive 9"))
    assert "spearman" not in fixed and -1 <= ours["spearman"] <= 1 and 0 <= ours["counts"] <= 1
    tokens = [count for own in ours["tokens_by_things"].values() for count in own]
    assert len(tokens) == 12 and 6 <= min(tokens) <= max(tokens) <= 13
    assert sum(tokens) / 12 == pytest.approx(ours["prompt_tokens"])
    header, _, first, second = rows(page.read_text().split("<!-- tables -->")[1].split("\n\n")[1])
    assert first[:3] == ["fixed 9", "9", ""] and second[0] == "adaptive 9" and " to " in second[6]
    assert (tmp_path / "docs/images/adaptive.png").stat().st_size > 5000
    adaptive.main()
    assert len(in_this_process) == 2


def test_ranks_correlate_and_numbers_are_read():
    assert adaptive.spearman([1, 2, 3, 9], [2, 3, 7, 8]) == pytest.approx(1)
    assert adaptive.spearman([1, 1, 2, 2], [4, 3, 1, 1]) == pytest.approx(-0.9428, abs=1e-4)  # ranks 1.5 1.5 3.5 3.5
    assert adaptive.spearman([3, 3, 3], [1, 2, 3]) == 0
    shown = [types.SimpleNamespace(kind=kind, things=(None,) * n) for kind, n in (
        ("count", 2), ("count", 3), ("count", 4), ("single", 1))]  # fmt: skip
    said = ["two red squares", "a group of three, not four", "some four-leaved twos", "two dogs"]
    assert adaptive.counts_told([{"caption": one} for one in said], shown) == 1
    assert adaptive.counts_told([{"caption": one} for one in said[1:] + said[:1]], shown) == 0


def test_several_captions_of_a_photo_from_end_to_end(in_this_process, parts, tmp_path, monkeypatch):
    """Equal time: steps follow the measured step; the first test photos by name are scored, on the same ones each."""
    images, file = photos(tmp_path / "photos", 4)
    page = tmp_path / "page.md"
    page.write_text(f"{START}\n{END}")
    monkeypatch.setattr(flickr8k, "TIMING_STEPS", 2)
    monkeypatch.setattr(flickr8k, "median", lambda values: 1.0)
    arguments = ["--images", str(images), "--captions", str(file), "--minutes", str(2 / 60), "--scored", "3"]
    arguments += ["--arms", "one", "five_of_four", "--seeds", "7", "--folder", str(tmp_path / "made")]
    arguments += ["--out", str(tmp_path / "found.json"), "--page", str(page), "--set", *tiny(parts)]
    monkeypatch.setattr(sys, "argv", ["texts_per_image.py", *arguments])
    texts_per_image.main()
    assert in_this_process[-2:] == ["one_steps2_seed7", "five_of_four_steps2_seed7"]
    header, _, *found = rows(page.read_text().split("\n\n")[1])
    one, five = (dict(zip(header, row, strict=True)) for row in found)
    assert (one["captions a photo"], five["captions a photo"], five["photos a step"]) == ("1", "5", "4")
    assert one["less one caption's (95 %)"] == "" and " to " in five["less one caption's (95 %)"]
    result = json.loads(next((tmp_path / "made/runs/one_steps2_seed7/result").glob("test_2.json")).read_text())
    assert sorted(row["image_id"] for row in result["rows"]) == ["02.jpg", "05.jpg", "08.jpg"]


def test_findings_of_stages_from_end_to_end(in_this_process, parts, tmp_path, monkeypatch):
    """AI captions beside human ones, a share for alignment, and questions, two steps each on tiny parts."""
    coco = tmp_path / "coco"
    coco.mkdir()
    folder, _ = photos(coco / "images", 4)
    file = (coco / "captions.csv").rename(tmp_path / "splits.csv")
    names = sorted(path.name for path in folder.iterdir())
    for kind in ("captions", "captions_vinvl"):
        lines = [f"{name},{kind} {n}" for n, name in enumerate(names)]
        (coco / f"{kind}.csv").write_text("\n".join(["image,caption", *lines]))
    asked = [{"image": name, "question": f"is it {n}", "answer": "yes" if n % 4 < 2 else "red",
              "split": ("train", "test")[n % 2]} for n, name in enumerate(names)]  # fmt: skip
    (coco / "qa.json").write_text(json.dumps(asked))
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{START}\n{END}\n")
    monkeypatch.setattr(stage_findings, "SHARES", (0.0, 0.5))
    here = str(tmp_path)
    arguments = ["--coco", str(coco), "--flickr8k", str(folder), str(file), "--vqa-rad", str(coco), "--steps", "2"]
    arguments += ["--scored", "3", "--only", "ai", "alignment", "radiology", "--seeds", "7", "--jobs", "1"]
    arguments += ["--folder", f"{here}/made", "--results", here, "--page", str(page), "--set", *tiny(parts)]
    monkeypatch.setattr(sys, "argv", ["stage_findings.py", *arguments])
    stage_findings.main()
    assert len(in_this_process) == 2 + 2 + 1
    trained = json.loads((tmp_path / "made/runs/ai0_steps2_seed7/run.json").read_text())
    assert trained["data"]["size"] == 3 and trained["config"]["datasets"]["image_captions"]["captions"] is None
    assert "captions_vinvl" in (tmp_path / "made/coco_ai.csv").read_text()
    assert "captions_vinvl" not in (tmp_path / "made/coco_test.csv").read_text()
    tables = page.read_text().split("\n\n")[2:5]
    assert [rows(table)[2][0] for table in tables] == ["AI-generated", "0% of the steps", "from nothing"]
    assert "blind closed" in rows(tables[2])[0]


def test_real_clips_zero_shot_and_trained_from_end_to_end(in_this_process, parts, tmp_path, monkeypatch, capsys):
    image_model = Runs(parts, tmp_path)
    image_model.config["model"] |= {"llm_train": "lora", "skip": "pooled"}
    image_model.train()
    clips = tmp_path / "clips"
    clips.mkdir()
    lines = ["video,caption,split"]
    for n in range(6):
        write_clip(clips / f"{n}.avi")
        lines += [f"{n}.avi,clip {n} {word},{'train' if n < 3 else 'test'}" for word in ("here", "there")]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    arguments = ["--videos", str(clips), "--captions", str(tmp_path / "captions.csv"), "--steps", "2", "--seeds", "7"]
    arguments += ["--start", str(image_model.output() / "checkpoint_last.pth"), "--folder", str(tmp_path / "made")]
    arguments += ["--arms", "zero_shot_concat", "convex_positions", "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["real_clips.py", *arguments, "--set", *tiny(parts)])
    real_clips.main()
    assert in_this_process == ["zero_shot_concat_steps1_seed7", "convex_positions_steps2_seed7"]
    made = torch.load(tmp_path / "made/runs" / in_this_process[0] / "checkpoint_last.pth", weights_only=True)["model"]
    before = torch.load(image_model.output() / "checkpoint_last.pth", weights_only=True)["model"]
    assert all(torch.equal(made[name], value) for name, value in before.items())  # zero-shot: nothing moved
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    zero_shot, trained = rows(real_clips.table(found))[2:]
    assert real_clips.table(found) in capsys.readouterr().out and found["convex_positions"][0]["clips"] == 3
    assert zero_shot[0] == "concat, zero-shot" and zero_shot[-2] == "none" and trained[0] == "convex, with positions"


MACS = {"tomeformer": 10.0, "qformer": 16.0, "stage1": 5.0}


def pretend(runs, folder, jobs):
    """Files of runs whose loss is their learning rate, and whose MACs a step are those of MACS."""
    for run in runs:
        options = dict(option.split("=", 1) for option in run.options)
        steps, out = int(options["run.max_iters"]), folder / "runs" / run.name
        macs = MACS.get(options.get("model.connector", "stage1"), 1.0)
        loss = float(options.get("run.init_lr", 1))
        card = {
            "metrics": {**scored(loss, loss), "metrics": {"CIDEr": 1}, "blind": {"CIDEr": 0}}, "data": {"split": "val"},
            "model": {"trainable_parameters": 7}, "config": {"model": {}},
        }  # fmt: skip
        (out / "result").mkdir(parents=True)
        for path in ("run.json", f"result/val_{steps}.card.json", f"result/test_{steps}.card.json"):
            (out / path).write_text(json.dumps(card))
        row = {"step": steps, "loss": 1.0, "seconds_per_step": 2.0, "images_per_s": 0.5, "flops_per_image": 2 * macs}
        (out / "log.jsonl").write_text(json.dumps(row) + "\n")


def test_the_miniature_takes_the_best_setting_and_two_stages_cost_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "train", pretend)
    (tmp_path / "photos").mkdir()
    args = argparse.Namespace(images=tmp_path / "photos", captions="c.txt", folder=tmp_path / "made", steps=330,
                              sweep_steps=100, seeds=[42, 1], jobs=1)  # fmt: skip
    found = miniature.Miniature(args).compare()
    assert list(found) == list(miniature.CONNECTORS) and not found["linear"]["sweep"]
    for label, rate in (("TomeFormer, one stage", 2.5e-3), (miniature.POOLING, 1e-3), ("linear", 1e-3)):
        assert found[label]["setting"]["init_lr"] == rate and [run["seed"] for run in found[label]["runs"]] == [42, 1]
    one, two = (found[label]["runs"][0] for label in ("TomeFormer, one stage", miniature.TWO_STAGES))
    assert one["macs"] == 330 * 10 == pytest.approx(two["macs"], rel=0.01) and one["steps_ahead"] == 0
    assert two["steps_ahead"] / two["steps"] == pytest.approx(250 / 80, rel=0.01)
    assert two["seconds"] == 2 * (two["steps"] + two["steps_ahead"])
    plan = miniature.Miniature(args).full(miniature.TWO_STAGES, miniature.STAGE1_BODY[0], 1).run
    (start,) = [option for option in plan.options if option.startswith("model.connector_init=")]
    assert start.endswith(f"runs/stage1_steps{two['steps_ahead']}_seed1/checkpoint_last.pth")
