"""`run.texts_per_image`: whole runs on pictures with up to five captions, and what is refused."""

import json

import pytest

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.packing import TextGroups
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners.preflight import check_texts
from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, log, losses, same_tensors
from tests.test_cli import evlgen

STEPS = 6


@pytest.fixture(scope="module")
def packed(parts, tmp_path_factory) -> Runs:
    """Batches of four pictures with up to three of their five captions: groups of 3 and 2, without dropout."""
    runs = Runs(
        parts, tmp_path_factory.mktemp("packed"), max_iters=STEPS, iters_per_inner_epoch=2, batch_size_train=4,
        accum_grad_iters=2, texts_per_image=3,
    )  # fmt: skip
    runs.config["model"] |= {"dropout": 0.0}
    runs.config["datasets"]["scenes"] |= {"sizes": {"train": 7, "val": 4}, "captions_per_image": 5}
    return runs


@pytest.fixture(scope="module")
def whole(packed):
    packed.runner = packed.train()
    return packed


def options(steps: int) -> list[str]:
    return [f"run.max_iters={steps}", "run.min_lr=1e-2", "run.warmup_lr=1e-2"]  # one rate at any max_iters


def test_pictures_and_texts_are_counted(whole):
    rows = [row for row in log(whole.output()) if "loss" in row]
    groups = TextGroups(whole.runner.datasets["scenes"]["train"], 3, 0)
    assert len(groups) == 14 and {len(groups.rows(0, group)) for group in range(14)} == {2, 3}
    for row in rows:
        assert 16 <= row["texts_per_step"] <= 24  # of 8 pictures
        assert row["texts_per_s"] / row["images_per_s"] == pytest.approx(row["texts_per_step"] / 8)
    epochs = [row["texts_per_step"] for row in rows]
    assert sum(epochs) == pytest.approx(35 * STEPS * 8 / 14, abs=2)  # 35 texts in 14 groups


def test_two_ranks_are_one_with_twice_the_batch(whole, tmp_path):
    runs = whole.copy(tmp_path, batch_size_train=2)
    on_two_ranks(runs)
    expected, found = losses(whole.output()), losses(runs.output())
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-5, rel=1e-5)
    texts = [[row["texts_per_step"] for row in log(one.output()) if "loss" in row] for one in (whole, runs)]
    assert texts[0] == texts[1]


def test_a_resumed_run_goes_on_bit_for_bit(packed, tmp_path):
    straight, cut = packed.copy(tmp_path / "a"), packed.copy(tmp_path / "b")
    straight.train(*options(STEPS))
    cut.train(*options(3))
    cut.train(*options(STEPS), "run.resume_ckpt_path=auto")
    assert losses(cut.output()) == losses(straight.output()) and len(losses(cut.output())) == STEPS
    assert same_tensors(checkpoint(cut.output())["model"], checkpoint(straight.output())["model"])


def test_a_resume_with_other_groups_is_refused(packed, tmp_path, capsys):
    runs = packed.copy(tmp_path)
    assert runs.command(*options(2)) == 0
    told = capsys.readouterr().err
    assert "8 images a step (4 x 1 ranks x 2 accumulated), up to 3 texts of each" in told and " texts/s  data" in told
    for now in (1, 2):
        assert runs.command(*options(4), "run.resume_ckpt_path=auto", f"run.texts_per_image={now}") == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"trained with run.texts_per_image=3, this run has {now}" in line and "model.pretrained=" in line


def test_the_evaluations_loss_may_be_over_several_references(whole, tmp_path):
    best = whole.output() / "checkpoint_last.pth"
    found = {}
    for texts in (1, 3):
        runs = whole.copy(tmp_path / str(texts))
        args = (f"model.pretrained={best}", "run.test_splits=[val]", f"run.eval_texts_per_image={texts}")
        runner = runs.train(*args, evaluate=True)
        found[texts] = json.loads((runs.output() / "result" / "val_given.json").read_text())
    card = json.loads((runs.output() / "run.json").read_text())
    assert card["metrics"]["loss_texts_per_image"] == 3 and "loss_texts_per_image" not in found[1]
    data, model = runner.datasets["scenes"]["val"], runner.model.eval()
    partner = runner.task.blind.partner
    rows = {row["instance_id"]: row for row in found[3]["rows"]}
    assert {row["caption"] for row in found[1]["rows"]} == {row["caption"] for row in rows.values()}
    for number, row in enumerate(data.annotation):
        texts = data.references[row["image_id"]][:3]
        other = next(n for n, of in enumerate(partner) if of == number)  # whose picture these texts are also put under
        for picture, key in ((number, "loss"), (other, "loss_shuffled")):
            image = data[picture]["image"].unsqueeze(0)
            alone = [model.loss_of(model.visual_prompt(image), {"text_input": [data.text_processor(text)]})
                     for text in texts]  # fmt: skip
            nats, tokens = (sum(one[n].item() for one in alone) for n in (0, 1))
            assert rows[str(number)][key] == pytest.approx(nats, rel=1e-4)
        assert rows[str(number)]["tokens"] == tokens
    assert found[3]["loss_right"] != pytest.approx(found[1]["loss_right"], rel=1e-3)


def test_what_learns_one_text_at_a_time_is_refused(runs, capsys):
    for changes, said in (
        (["run.task=scst", "model.pretrained=x.pth"], "run.task=scst draws its captions itself, run.num_samples of a"),
        (["model.arch=blip2_opt", "model.model_type=pretrain_opt2.7b", "run.task=image_text_pretrain"],
         "model.arch=blip2_opt learns one text of a picture at a time; leave it out"),
    ):  # fmt: skip
        assert runs.command("run.texts_per_image=2", *changes) == 2
        assert said in capsys.readouterr().err
    assert runs.command("run.texts_per_image=0") == 2
    assert "run.texts_per_image" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["run.texts_per_image=2", "run.eval_texts_per_image=2"])
def test_a_language_model_that_cannot_is_refused_before_the_first_step(runs, monkeypatch, capsys, key):
    def cannot(self):
        raise ValueError("its texts would see each other")

    monkeypatch.setattr(EVLGen, "check_packing", cannot)
    assert runs.command(key) == 2
    assert f"{key}: its texts would see each other" in capsys.readouterr().err.splitlines()[-1]
    assert not runs.output().exists()


def test_data_sets_of_others_are_refused():
    check_texts(1, {"coco_caption": object()})
    with pytest.raises(ConfigError, match=r"run.texts_per_image=2: datasets.coco_caption, none of this package's"):
        check_texts(2, {"coco_caption": object()})


def test_the_doctor_says_how_long_an_epoch_is(packed, capsys):
    evlgen("doctor", packed.path())
    told = capsys.readouterr().out
    assert "an epoch of scenes: 14 groups of texts of a picture (35 texts of 7 images), 1.75 steps of one" in told
    evlgen("doctor", packed.path(), "--options", "run.texts_per_image=1")
    assert "an epoch of scenes: 35 rows, 4.375 steps of one process" in capsys.readouterr().out
