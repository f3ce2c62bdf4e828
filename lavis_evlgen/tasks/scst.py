"""Self-critical sequence training: the model's own captions, weighted by how much better they score than a baseline.

Source: Rennie et al. 2017, "Self-critical Sequence Training for Image Captioning"; EVLGen uses it on MSR-VTT.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from lavis.common.registry import registry
from torch import Tensor

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.as_trained import weights_of
from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.facts import adapted
from lavis_evlgen.datasets.seeding import mix
from lavis_evlgen.evaluation.cider_d import CaptionReward
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.nn import across_picture_share
from lavis_evlgen.tasks.base import Objective
from lavis_evlgen.tasks.captioning import CaptionTaskSettings, EvlgenCaptionTask
from lavis_evlgen.tasks.settings import SharedRunSettings

BASELINES = ("greedy", "leave_one_out")
_DRAWING = 11  # tells these seeds from those of order and augmentation
TOO_SHORT = 0.5  # of the references' mean length


@dataclass(kw_only=True)
class ScstSettings(CaptionTaskSettings):
    baseline: Literal[BASELINES] = key(
        "what a drawn caption's reward is compared with: greedy, the model's own greedy caption; leave_one_out, the "
        "mean of the picture's other drawn captions", "greedy",
    )  # fmt: skip
    num_samples: int | None = key(
        "captions drawn for each picture of a step; left out: greedy 1, leave_one_out 5", None, at_least=1,
        at_most=10_000,
    )  # fmt: skip
    temperature: float = key(
        "divides the logits in drawing, and in the log-probabilities that are trained", 1.0, at_least=0.01,
        at_most=100.0,
    )  # fmt: skip
    top_p: float = key(
        "below 1, captions are drawn from the nucleus only, and the gradient is no longer exact", 1.0, at_least=0.01,
        at_most=1.0,
    )  # fmt: skip
    end_mark: bool = key(
        "true: ending is a word of the reward, so that captions cut off in mid-sentence score less", True
    )


@dataclass(frozen=True)
class Policy:
    """How captions are drawn, and what their reward is compared with."""

    baseline: str
    num_samples: int
    temperature: float
    top_p: float
    max_len: int
    seed: int

    @classmethod
    def of(cls, run: ScstSettings, seed: int) -> Policy:
        """What the run section asks for. Raises ConfigError."""
        samples = run.num_samples or (1 if run.baseline == "greedy" else 5)
        if run.baseline == "leave_one_out" and samples < 2:
            raise ConfigError("run.baseline=leave_one_out compares samples with each other: set run.num_samples >= 2")
        return cls(run.baseline, samples, run.temperature, run.top_p, run.max_len, seed)

    @property
    def greedy(self) -> bool:
        """Whether the greedy caption of a picture is needed."""
        return self.baseline == "greedy"

    @property
    def rows(self) -> int:
        """Captions of a picture: the greedy one first where it is needed, then the drawn ones."""
        return self.num_samples + self.greedy

    def seeds(self, micro_step: int, pictures: int) -> list[int]:
        """One for each picture of this rank: a function of the run's seed and the sample's number in the training
        stream, so that neither ranks, accumulation nor a resume change what is drawn."""
        first = (micro_step * distributed.world_size() + distributed.rank()) * pictures
        return [mix(self.seed, _DRAWING, first + n) for n in range(pictures)]

    def advantages(self, rewards: Tensor) -> Tensor:
        """rewards (B, rows) -> (B, num_samples): each drawn caption's reward minus its baseline, which the caption
        itself has no part in."""
        if self.greedy:
            return rewards[:, 1:] - rewards[:, :1]
        others = (rewards.sum(1, keepdim=True) - rewards) / (self.num_samples - 1)
        return rewards - others


@registry.register_task("scst")
class ScstTask(EvlgenCaptionTask):
    """Trains a captioner on CIDEr-D of its own captions; evaluates as evlgen_captioning.

    Loss: the mean over drawn captions of -(reward - baseline) * log p(caption), whose gradient is that of minus the
    expected reward. Draws and log-probabilities are of the same visual prompt, dropout included.
    """

    Settings = ScstSettings
    reward: CaptionReward | None = None  # none in an evaluation
    policy: Policy
    end_mark = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.workers, self.warned = ThreadPoolExecutor(1, "reward"), False

    @classmethod
    def setup_task(cls, cfg):
        task, run = super().setup_task(cfg), cls.Settings.read(cfg.run_cfg, "run.")
        shared = SharedRunSettings.read(cfg.run_cfg, "run.")
        task.policy, task.end_mark = Policy.of(run, shared.seed), run.end_mark
        if not shared.evaluate:
            _check_start(cfg.model_cfg)
        return task

    def check_arch(self, cfg):
        if not issubclass(registry.get_model_class(cfg.model_cfg.arch), EVLGen):
            raise ConfigError(f"run.task=scst trains EVLGen captioners; model.arch={cfg.model_cfg.arch} is none")

    def build_datasets(self, cfg):
        """The data sets; the references of the training set become the reward."""
        datasets = super().build_datasets(cfg)
        if not SharedRunSettings.read(cfg.run_cfg, "run.").evaluate:
            self.reward = CaptionReward(_references(datasets), self.tokenizer, self.end_mark)
            self._log_reward()
        return datasets

    def _log_reward(self):
        facts = self.reward.facts()
        logging.info(
            "reward: CIDEr-D, %s; references by the %s tokenizer, captions by %s (the same words on %.2f%% of the "
            "references); mean reference %.1f words",
            facts["document_frequencies"], facts["tokenizer_of_references"], facts["tokenizer_of_captions"],
            100 * self.reward.agreement, self.reward.mean_words,
        )  # fmt: skip

    def objective(self, micro_step: int) -> Objective:
        return partial(self._policy_gradient, micro_step)

    def _policy_gradient(self, micro_step: int, model, prompt, samples: dict) -> dict:
        policy, pictures = self.policy, len(prompt.tokens)
        rows = model.sample(
            prompt, samples, seeds=policy.seeds(micro_step, pictures), num_samples=policy.num_samples,
            greedy=policy.greedy, max_new_tokens=policy.max_len, temperature=policy.temperature, top_p=policy.top_p,
        )  # fmt: skip
        text = model.language_model.text
        captions, ended = text.decode(rows), [row[-1] == text.end_id for row in rows]
        # scored by another thread while this one runs the language model again, with gradients
        scoring = self.workers.submit(self._score, samples["image_id"], captions, ended)
        drawn = [row for n, row in enumerate(rows) if n % policy.rows >= policy.greedy]
        log_probs, tokens = model.log_probs_of(prompt, samples, drawn, policy.temperature)
        rewards, words = (torch.tensor(values, device=log_probs.device) for values in scoring.result())
        rewards = rewards.view(pictures, policy.rows)
        loss = -(policy.advantages(rewards).flatten() * log_probs).mean()
        shown = {
            "reward": rewards[:, policy.greedy :].mean(),
            "entropy": -log_probs.detach().sum() / tokens.sum(),
            "length": words.view(pictures, policy.rows)[:, policy.greedy :].mean(),
        }
        if policy.greedy:
            shown["reward_greedy"] = rewards[:, 0].mean()
        return {"loss": loss, "across_picture_share": across_picture_share(prompt.tokens, prompt.mask), "shown": shown}

    def _score(self, image_ids: list, captions: list[str], ended: list[bool]) -> tuple[list[float], list[float]]:
        """CIDEr-D and number of words of each caption; a picture's captions are in a row."""
        scored = [
            self.reward(image_ids[n // self.policy.rows], caption, ended[n]) for n, caption in enumerate(captions)
        ]
        return [reward for reward, _ in scored], [float(words) for _, words in scored]

    def watch(self, row: dict):
        """Warn once when the drawn captions of a window have become much shorter than the references."""
        if "length" in row and row["length"] < TOO_SHORT * self.reward.mean_words and not self.warned:
            self.warned = True
            logging.warning(
                "captions have become short: %.1f words at step %d, where references have %.1f; the reward may be "
                "gamed: lower run.init_lr, keep run.end_mark=true, or stop earlier (docs/scst.md)",
                row["length"], row["step"], self.reward.mean_words,
            )  # fmt: skip

    def after_evaluation(self, val_result: list[dict], split_name: str, epoch, **kwargs) -> dict:
        """As evlgen_captioning; in training, `reward` says what was rewarded, for the run card."""
        result = super().after_evaluation(val_result, split_name, epoch, **kwargs)
        return result if self.reward is None else {**result, "reward": self.reward.facts()}


def _check_start(model):
    """Raises ConfigError where no trained weights are given: the captions of an untrained model all score nothing."""
    if not weights_of(model):
        raise ConfigError(
            "run.task=scst goes on from a captioner, and model.pretrained is empty: train one with "
            "run.task=evlgen_captioning first, then set model.pretrained=output/.../checkpoint_best.pth"
        )


def _references(datasets: dict) -> dict:
    """The raw training captions by image id. Raises ConfigError unless exactly one training set has them."""
    train = {name: splits["train"] for name, splits in datasets.items() if "train" in splits}
    if len(train) != 1:
        raise ConfigError(f"run.task=scst rewards by the captions of one training set, not of {len(train)}: keep one")
    name, dataset = next(iter(train.items()))
    if adapted(dataset).references is None:
        raise ConfigError(
            f"run.task=scst needs all captions of a picture before training, and {name} has no references: read them "
            "with image_captions"
        )
    return dataset.references
