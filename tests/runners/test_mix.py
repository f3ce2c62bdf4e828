"""A mix of data sets: which set a rank draws, and that a resume knows what had been drawn."""

import pytest
from PIL import Image

from tests.processes import on_two_ranks
from tests.run_tools import Runs, checkpoint, losses, same_tensors


@pytest.fixture
def mixed(parts, tmp_path) -> Runs:
    """Scenes and own pictures, 1 to 1, eight steps; a checkpoint at 4."""
    runs = Runs(parts, tmp_path, max_iters=8, iters_per_inner_epoch=4, train_dataset_ratios={"scenes": 1,
                "image_captions": 1})  # fmt: skip
    images = tmp_path / "images"
    images.mkdir()
    for n in range(7):
        Image.effect_noise((30, 30), 50 + n).convert("RGB").save(images / f"{n}.png")
    rows = "".join(f'{n}.png,"picture number {n} of noise"\n' for n in range(7))
    (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
    runs.config["datasets"]["image_captions"] = {
        "images": str(images), "captions": str(tmp_path / "captions.csv"), "split": {"train": 7},
        "vis_processor": runs.config["datasets"]["scenes"]["vis_processor"],
    }  # fmt: skip
    return runs


@pytest.mark.parametrize("per_rank", [False, True])
def test_two_ranks_go_on_bit_for_bit(mixed, tmp_path, per_rank):
    mixed.config["run"]["mix_per_rank"] = per_rank
    cut = mixed.copy(tmp_path / "cut")
    for runs, options in ((mixed, []), (cut, ["run.max_iters=4"]), (cut, ["run.resume_ckpt_path=auto"])):
        on_two_ranks(runs, *options, "run.min_lr=1e-2", "run.warmup_lr=1e-2")  # one rate at any max_iters
    assert losses(cut.output()) == losses(mixed.output()) and len(losses(cut.output())) == 8
    assert same_tensors(checkpoint(cut.output())["model"], checkpoint(mixed.output())["model"])


@pytest.mark.parametrize(
    "then, now, per_rank",
    [((2, 2), (4, 1), False), ((4, 1), (1, 4), False), ((2, 2), (4, 1), True)],
)
def test_draws_of_another_size_are_refused(mixed, capsys, then, now, per_rank):
    """At the same pictures a step, it went on at another place in each set."""

    def options(batch, accumulated):
        return [f"run.batch_size_train={batch}", f"run.accum_grad_iters={accumulated}", f"run.mix_per_rank={per_rank}"]

    mixed.train(*options(*then), "run.max_iters=4")
    assert mixed.command(*options(*now), "run.resume_ckpt_path=auto") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"drew a data set for every {then[0]} images, this run would for every {now[0]}" in line
    assert "run.accum_grad_iters" in line and "model.pretrained=" in line


def test_one_set_alone_keeps_its_place_at_any_accumulation(runs):
    """Its place is counted in pictures."""
    runs.train("run.batch_size_train=4", "run.max_iters=2", "run.iters_per_inner_epoch=2")
    runs.train("run.batch_size_train=2", "run.accum_grad_iters=2", "run.resume_ckpt_path=auto")
    assert list(losses(runs.output())) == [1, 2, 3, 4]


def test_a_checkpoint_of_before_tells_by_its_config(mixed, capsys):
    import torch

    mixed.train("run.batch_size_train=2", "run.accum_grad_iters=2", "run.max_iters=4")
    content = checkpoint(mixed.output())
    del content["images_per_draw"]
    torch.save(content, mixed.output() / "checkpoint_last.pth")
    assert mixed.command("run.batch_size_train=4", "run.resume_ckpt_path=auto") == 2
    assert "for every 2 images" in capsys.readouterr().err.splitlines()[-1]
    mixed.train("run.batch_size_train=2", "run.accum_grad_iters=2", "run.resume_ckpt_path=auto")


def test_mix_per_rank_is_a_switch(mixed, capsys):
    assert mixed.command("run.mix_per_rank=sometimes") == 2
    assert "run.mix_per_rank: 'sometimes' is not true or false" in capsys.readouterr().err.splitlines()[-1]
