"""EVLGen: frozen vision encoder -> connector -> frozen language model, one stage, one loss."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_evlgen.config.as_trained import StartSettings, weights_of
from lavis_evlgen.config.keys import key, keys_of, plain
from lavis_evlgen.models.connectors import ConnectorSettings, VisualPrompt, build_connector
from lavis_evlgen.models.elastic import VisualPrompts, sandwich
from lavis_evlgen.models.facts import ModelFacts
from lavis_evlgen.models.generation import Generates
from lavis_evlgen.models.language.llm_train import Lora, save_adapter, training_of
from lavis_evlgen.models.language.loading import load_language_model
from lavis_evlgen.models.language.model import LanguageModel
from lavis_evlgen.models.language.settings import LanguageSettings
from lavis_evlgen.models.language.text_loss import held_out_text, text_loss
from lavis_evlgen.models.lengths import PromptLengths
from lavis_evlgen.models.precision import check_precision
from lavis_evlgen.models.questions import AsksQuestions
from lavis_evlgen.models.vision.encoder import VisionSettings, vision_of
from lavis_evlgen.nn import across_picture_share
from lavis_evlgen.weights.bundle import Bundled, check_frozen, differences, read_config
from lavis_evlgen.weights.frozen_identity import check_identity
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import facts_of_checkpoint, load_checkpoint_file, model_section

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
PARTS = ("ln_vision", "input_proj", "connector", "gates", "llm_proj", "soft_prompt", "language_model")


@dataclass(kw_only=True)
class EvlgenSettings(LanguageSettings, ConnectorSettings, VisionSettings, StartSettings):
    """The model section of `arch: evlgen`."""

    finetuned: str | None = key("checkpoint loaded when load_finetuned is true", None)
    drop_path_rate: float = key(
        "accepted from LAVIS configs; a frozen ViT has none, so it must be 0", 0.0, at_least=0.0, at_most=1.0
    )
    use_grad_checkpoint: bool = key(
        "accepted from LAVIS configs; a frozen ViT has no gradients, so it must be false", False
    )
    prompt_scale: Literal["released", "embedding"] | float = key(
        "released: plain nn.Linear at the LLM; embedding: output starts at the size of the LLM's embedding table; a "
        "number: that many times it", "released", at_least=1e-6, at_most=1e6,
    )  # fmt: skip
    soft_prompt: bool = key(
        "true: a learned vector, zero at first, is added at each place of the visual prompt (as released: false)", False
    )
    lr_scale: dict[Literal[PARTS], float] | None = key(
        f"learning-rate factor of each part: {', '.join(PARTS)}; left out: 1", {}, at_least=0.0, at_most=1e6
    )


@registry.register_model("evlgen")
class EVLGen(Generates, VisualPrompts, PromptLengths, AsksQuestions, Bundled, ModelFacts, BaseModel):
    """EVLGen-Image (EVLGen, section 3.2). Types: opt2.7b, opt6.7b, vicuna7b, vicuna13b, quickstart.

    >>> model, vis, txt = load_model_and_preprocess("evlgen", "quickstart", is_eval=True)
    >>> model.generate({"image": vis["eval"](pil_image)[None]})
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        name: str(CONFIGS / f"evlgen_{name}.yaml")
        for name in ("opt2.7b", "opt6.7b", "vicuna7b", "vicuna13b", "quickstart")
    }
    PARTS, Settings = PARTS, EvlgenSettings
    packs_texts = True

    def __init__(
        self,
        vision: nn.Module,
        connector: nn.Module,
        language_model: LanguageModel,
        prompt: str = "",
        prompt_scale: str | float = "released",
        lr_scale: dict[str, float] | None = None,
        soft_prompt: bool = False,
    ):
        super().__init__()
        self.visual_encoder, self.connector, self.language_model = vision, connector, language_model
        self.ln_vision = nn.LayerNorm(vision.width)
        if connector.ln_vision_init is not None:
            self.ln_vision.load_state_dict(connector.ln_vision_init)
        self.llm_proj = nn.Linear(connector.width, language_model.width)
        if not isinstance(soft_prompt, bool):
            raise ValueError(f"soft_prompt: {soft_prompt!r} is not true or false")
        if soft_prompt and connector.budgets is not None:
            raise ValueError("soft_prompt: it has a vector for each token, and tome_r.elastic leaves several numbers "
                             "of them; leave soft_prompt out, or give tome_r one number: {target: 29}")  # fmt: skip
        places = torch.zeros(connector.num_output_tokens, language_model.width)  # (L', D_l)
        self.soft_prompt = nn.Parameter(places) if soft_prompt else None
        self.prompt = prompt or ""
        language_model.check_prompt(self.prompt)
        unknown = set(lr_scale or {}) - set(self.PARTS)
        if unknown:
            raise ValueError(f"lr_scale: unknown part {sorted(unknown)[0]}; the parts are {', '.join(self.PARTS)}")
        self.lr_scale = {part: float((lr_scale or {}).get(part, 1.0)) for part in self.PARTS}
        if prompt_scale != "released":
            self._scale_prompt(1.0 if prompt_scale == "embedding" else prompt_scale)
        self.reads_questions = connector.condition == "question"
        if self.reads_questions:  # last, so that all else starts as without it
            connector.read_questions(language_model.width)

    @torch.no_grad()
    def _scale_prompt(self, factor: float):
        """Start the visual prompt at `factor` standard deviations of the LLM's embedding table, measured on noise."""
        if isinstance(factor, str) or not factor > 0:
            raise ValueError(f"prompt_scale: {factor!r} is not released, embedding or a number above 0")
        if self.llm_proj.weight.is_meta:
            return
        with torch.random.fork_rng(devices=[]):
            noise = self.connector.noise(self.visual_encoder.num_tokens, self.visual_encoder.width)
            rms = self.connector.eval()(noise, features=noise).tokens.float().pow(2).mean().sqrt()
        self.connector.train()
        std = factor * self.language_model.embedding_std() / (rms.item() * self.connector.width**0.5)
        nn.init.normal_(self.llm_proj.weight, std=std)
        nn.init.zeros_(self.llm_proj.bias)

    def text_loss(self) -> dict | None:
        lm = self.language_model
        return text_loss(lm.llm, lm.text.tokenizer, held_out_text()) if lm.llm_train else None

    def additions(self) -> list[set[str]]:
        """Groups of trainable tensors that `pretrained` may lack as a whole (weights/trainable.py)."""
        soft_prompt = {"soft_prompt"} if self.soft_prompt is not None else set()
        # these change nothing at first, or training finds them
        later = [{name for name in self.state_dict() if name.startswith(f"connector.{module}")}
                 for module in ("readout.", "conditioning.", "tomeformer.thresholds")]  # fmt: skip
        return [group for group in (soft_prompt, *later, self.from_files()) if group]

    def from_files(self) -> set[str]:
        """What of the language model learns."""
        prefix = "language_model."
        return {name for name, p in self.named_parameters() if name.startswith(prefix) and p.requires_grad}

    def save_adapter(self, folder, weights: dict[str, Tensor]):
        """Of a bundle's `weights`, the language model's LoRA adapter in peft's format; nothing where it has none."""
        prefix = "language_model.llm."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if own and isinstance(self.language_model.llm_train, Lora):
            section = self.config or {}
            base = section.get("llm_model") or section.get("opt_model")
            save_adapter(self.language_model.llm, folder, base, own)

    @property
    def device(self) -> torch.device:
        return self.llm_proj.weight.device

    def part_of(self, name: str) -> str:
        """The part (a key of lr_scale) that trainable parameter `name` belongs to."""
        head, _, rest = name.partition(".")
        return self.connector.part_of(rest) if head == "connector" else head

    def connect(self, image: Tensor, return_source: bool = False) -> VisualPrompt:
        """image (B, 3, H, W), or its visual tokens (B, L, D_v) -> the connector's tokens (B, L', D_c)."""
        return self.connect_seen(self.visual_tokens(image), return_source)

    def visual_tokens(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) -> the frozen ViT's tokens (B, L, D_v), float32; stored tokens (B, L, D_v) pass through.

        Raises ValueError for three dimensions that are not those of tokens.
        """
        if image.ndim != 3:
            return self.visual_encoder(image)
        expected = (self.visual_encoder.num_tokens, self.visual_encoder.width)
        if tuple(image.shape[1:]) != expected:
            raise ValueError(f"image: of shape {tuple(image.shape)}; pictures are (B, 3, H, W), and the stored tokens "
                             f"of pictures (B, {expected[0]}, {expected[1]})")  # fmt: skip
        return image.float()

    def project(self, tokens: Tensor) -> Tensor:
        """The connector's tokens (B, L', D_c) as the LLM's (B, L', D_l); the soft prompt is each frame's, of clips."""
        tokens = self.llm_proj(tokens)
        if self.soft_prompt is None:
            return tokens
        return tokens + self.soft_prompt.repeat(tokens.shape[1] // len(self.soft_prompt), 1)

    def loss_of(self, prompt: VisualPrompt, samples: dict) -> tuple[Tensor, Tensor]:
        """Per text: summed cross-entropy (N,) in nats of samples["text_input"] under these prompts, tokens (N,); of
        samples["conversations"], where there are some, in the assistant's words.

        samples["texts_per_image"]: how many of the texts (and of samples["prompt"], where that is a list) each of the
        B pictures has, a picture's in a row; left out: one each. They share its visual prompt, unless the prompt is of
        as many rows as there are texts (merging that looks at each question). Raises ValueError.
        """
        lm, counts = self.language_model, samples.get("texts_per_image")
        if self.reads_questions and counts is not None and len(prompt.tokens) == sum(counts):
            counts = None  # each text has its own
        if "conversations" in samples:
            return lm.conversation_loss(prompt.tokens, samples["conversations"], prompt.mask, counts)
        texts = samples["text_input"]
        return lm.loss(prompt.tokens, texts, self._prompts(samples, len(texts)), prompt.mask, counts)

    def check_packing(self):
        """Raise ValueError where the texts of a picture cannot share its visual prompt: another language model can."""
        self.language_model.check_packing()

    def forward(self, samples: dict, objective=None) -> dict[str, Tensor]:
        """samples: image (as visual_tokens), text_input list[str], and where pictures have several texts
        texts_per_image (`loss_of`). loss: mean over supervised tokens (EVLGen, eq. 3). budgets: of a micro-step with an
        elastic `tome_r`, one of `token_draws`; left out: the number of tokens of an evaluation.

        `loss_tokens` is their number, so that a trainer can weight ranks rightly; `across_picture_share` is the share
        of the prompt's power that is variance across pictures (0: the connector has collapsed); `prompt_lengths`, where
        pictures differ in tokens: models/lengths.py. `objective`, a function of (model, visual prompt, samples),
        replaces the caption's loss by that of a task.
        """
        budgets = samples.get("budgets") or (None,)
        if len(budgets) > 1:
            return sandwich(self, samples, budgets, objective)
        prompt = self.prompts_for(samples, budgets[0])
        if objective is not None:
            return objective(self, prompt, samples) | self.histogram(prompt)
        sums, tokens = self.loss_of(prompt, samples)
        total, count = sums.sum(), tokens.sum()
        share = across_picture_share(prompt.tokens, prompt.mask)
        out = {"loss": total / count.clamp_min(1), "loss_tokens": count, "across_picture_share": share}
        return out | self.histogram(prompt)

    @torch.no_grad()
    def extract_features(self, samples: dict, mode: str = "image") -> BlipOutputFeatures:
        """image_embeds (B, L', D_c): the connector's tokens; image_embeds_proj (B, L', D_l): the LLM's prompt. Where
        pictures differ in tokens, rows of image_embeds end in zeros."""
        if mode != "image":
            raise ValueError(f"mode: {mode!r}; EVLGen has image features only")
        seen, condition = self.asked_in(samples)
        tokens = self.connect_seen(seen, condition=condition).tokens
        return BlipOutputFeatures(image_embeds=tokens, image_embeds_proj=self.project(tokens))

    def load_checkpoint(self, url_or_filename: str):
        """Load trainable weights strictly and safely (no pickled code); raises WeightsError.

        Other settings than a bundle or a run's checkpoint was trained with are logged; frozen parts of the same name
        that hold other weights are refused, and of a bundle's folder those of another kind or size.
        """
        if Path(url_or_filename).is_dir():
            content = read_config(url_or_filename)
            check_frozen(self, content, url_or_filename)
            trained = content["model"]
        else:
            content = facts_of_checkpoint(url_or_filename)
            trained = model_section(content, url_or_filename)
        keys = keys_of(type(self))
        defaults = {name: keys[name].default for name, value in trained.items() if name in keys and value is not None}
        others = differences(trained, defaults | (self.config or {}))
        try:
            load_checkpoint_file(self, url_or_filename, self.additions())
        except WeightsError as error:
            words = f". Settings that differ: {'; '.join(others)}" if others else ""
            raise WeightsError(f"{error}{words}") from None
        check_identity(self, content.get("frozen_weights") or {}, trained, self.config or {}, url_or_filename)
        for difference in others:
            logging.warning("%s: not as it was trained: %s", url_or_filename, difference)

    def load_checkpoint_from_config(self, cfg, **kwargs):
        path = weights_of(cfg)
        if not path and self.Settings.read(cfg).load_finetuned:
            raise ValueError("load_finetuned is true, but finetuned names no checkpoint")
        if path:
            self.load_checkpoint(path)
        else:
            there = {self.part_of(name) for name, parameter in self.named_parameters() if parameter.requires_grad}
            parts = ", ".join(part for part in self.PARTS if part in there)
            logging.info("no model.pretrained: %s are untrained", parts)

    @classmethod
    def build(cls, cfg) -> EVLGen:
        """The model of a config, without a checkpoint."""
        return build_evlgen(cls, cfg)

    @classmethod
    def from_config(cls, cfg) -> EVLGen:
        """Build from a LAVIS model config (keys: Settings) and load `pretrained` where given."""
        model = cls.build(cfg)
        model.config = plain(cfg)
        model.load_checkpoint_from_config(cfg)
        return model


def build_evlgen(cls, cfg, vision_of=vision_of, **more) -> EVLGen:
    """Vision encoder (by `vision_of(cfg)`), connector and language model of `cfg`, without a checkpoint.

    more: further arguments of `cls`.
    """
    settings = cls.Settings.read(cfg)
    for name, needed in (("freeze_vit", True), ("drop_path_rate", 0), ("use_grad_checkpoint", False)):
        if getattr(settings, name) != needed:
            raise ValueError(f"{name}: {getattr(settings, name)} asked; {keys_of(cls)[name].meaning}")
    llm, opt = settings.llm_model, settings.opt_model
    if llm and opt and llm != opt:
        raise ValueError(f"llm_model {llm} and opt_model {opt} differ; give one")
    if not (llm or opt):
        raise ValueError(f"llm_model is not set; give {keys_of(cls)['llm_model'].meaning}")
    if settings.tokens is not None and settings.soft_prompt:
        raise ValueError("tokens: soft_prompt has a vector for each token that it is trained with; leave tokens out")
    vision = vision_of(cfg)
    connector = build_connector(vision, plain(cfg))  # before the language model, which may take minutes to load
    precision = check_precision(settings.llm_precision, "llm_precision")
    language_model = LanguageModel(
        *load_language_model(llm or opt, precision, settings.trust_remote_code), settings.bos, settings.max_txt_len,
        settings.bos_token, settings.label_bos, settings.prompt_attention, training_of(settings.llm_train),
        settings.llm_adapter, settings.chat_template,
    )  # fmt: skip
    return cls(
        vision, connector, language_model, settings.prompt, settings.prompt_scale, settings.lr_scale,
        settings.soft_prompt, **more,
    )  # fmt: skip
