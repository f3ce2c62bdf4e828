"""What a connector decides by in evaluation, set from training pictures in front of it: the thresholds of
`model.tome_r: {average, least, most}`."""

from __future__ import annotations

import itertools

import torch

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.compile import eager
from lavis_evlgen.models.facts import facts_of
from lavis_evlgen.runners.preflight import sets_with


@torch.no_grad()
@eager()
def calibrate(trainer):
    """Called on every rank in front of the evaluations of a training, which then find the thresholds in checkpoints.

    The pictures are the first of the training stream, augmented as they are there: the same ones every time, on one
    rank or several, after a resume too. No generator that training uses is asked. The model is left in eval mode.
    """
    facts, data = facts_of(trainer.model), sets_with(trainer.datasets, "train")
    wanted = facts.calibration_pictures
    if not wanted:
        return
    if not trainer.shards.sets:  # nobody knows how many pictures shards have
        wanted = min(wanted, sum(map(len, data.values())))
    trainer.model.eval()
    steps = -(-wanted // (trainer.run.batch_size_train * distributed.world_size()))
    batches = itertools.islice(trainer.train_loader(data), steps)
    facts.calibrate(trainer.step.prepared(batch)["image"] for batch in batches)


def check_ranks(run, model):
    """Raises ConfigError where ranks could not compare their pictures: clips of one may have other numbers of frames.

    run: RunSettings.
    """
    if run.mix_per_rank and facts_of(model).calibration_pictures:
        raise ConfigError(
            "run.mix_per_rank=true: model.tome_r {average, least, most} compares the pictures of all ranks, which "
            "would be of different data sets, some perhaps clips; leave mix_per_rank out, or take tome_r {target: N}"
        )
