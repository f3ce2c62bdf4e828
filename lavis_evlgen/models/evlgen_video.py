"""EVLGen-Video: the image model on clips, frames mixed inside its frozen ViT; and the baselines that mix them after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lavis.common.registry import registry
from torch import Tensor

from lavis_evlgen.config.keys import key
from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.models.connectors.frame_pooling import (
    POOLINGS,
    TemporalQFormer,
    TemporalQueries,
    averaged,
    concatenated,
)
from lavis_evlgen.models.evlgen import CONFIGS, EVLGen, EvlgenSettings, build_evlgen
from lavis_evlgen.models.vision.temporal import TemporalSettings, TemporalVision, temporal_vision_of

PARTS = (*EVLGen.PARTS, "temporal")
POOLED_FIRST = ("mean", "temporal_queries")  # frame poolings whose connector reads the mean of the frames


@dataclass(kw_only=True)
class EvlgenVideoSettings(TemporalSettings, EvlgenSettings):
    """The model section of `arch: evlgen_video`."""

    frame_pooling: Literal[tuple(POOLINGS)] = key(
        "; ".join(f"{name}: {meaning}" for name, meaning in POOLINGS.items()), "mean"
    )
    lr_scale: dict[Literal[PARTS], float] | None = key(
        f"learning-rate factor of each part: {', '.join(PARTS)}; left out: 1", {}, at_least=0.0, at_most=1e6
    )


@registry.register_model("evlgen_video")
class EVLGenVideo(EVLGen):
    """EVLGen-Video (EVLGen, section 3.3). Types: opt2.7b, vicuna7b, quickstart.

    `samples["image"]` is (B, 3, T, H, W), as LAVIS's video processors give clips, or (B, 3, H, W), clips of one frame;
    all else is EVLGen. With temporal=false and frame_pooling concat or connector_mean it is the paper's baselines;
    with temporal_qformer or temporal_queries, in the style of the video models it compares with.

    >>> model, vis, txt = load_model_and_preprocess("evlgen_video", "quickstart", is_eval=True)
    >>> model.generate({"image": vis["eval"]("clip.mp4")[None]})
    """

    TYPES = ("opt2.7b", "vicuna7b", "quickstart")
    PRETRAINED_MODEL_CONFIG_DICT = {name: str(CONFIGS / f"evlgen_video_{name}.yaml") for name in TYPES}
    PARTS, Settings = PARTS, EvlgenVideoSettings

    def __init__(
        self,
        *parts,
        num_frames: int = TemporalSettings.num_frames,
        frame_pooling: str = EvlgenVideoSettings.frame_pooling,
        dropout: float | None = None,
        **settings,
    ):
        """dropout: of the module that frame_pooling trains, where it trains one (None: BERT's 0.1)."""
        super().__init__(*parts, **settings)
        if frame_pooling not in POOLINGS:
            raise ValueError(f"frame_pooling: {frame_pooling!r} is not one of {', '.join(POOLINGS)}")
        if self.connector.lengths_differ and frame_pooling not in ("mean", "concat"):
            raise ValueError(
                f"frame_pooling: {frame_pooling} needs as many tokens of every frame, and model.tome_r {{average, "
                f"least, most}} gives each its own number; take frame_pooling mean or concat, or tome_r {{target: N}}"
            )
        self.num_frames, self.frame_pooling = num_frames, frame_pooling
        self.temporal = isinstance(self.visual_encoder, TemporalVision)
        if frame_pooling == "temporal_qformer":
            self.frame_pool = TemporalQFormer(self.connector, num_frames, dropout)
        elif frame_pooling == "temporal_queries":
            self.frame_pool = TemporalQueries(self.connector, self.visual_encoder.width, dropout)
        if hasattr(self, "frame_pool") and self.soft_prompt is not None:
            raise ValueError(f"soft_prompt: {frame_pooling} has learned queries; one of the two is enough")

    @classmethod
    def build(cls, cfg) -> EVLGenVideo:
        settings = cls.Settings.read(cfg)
        return build_evlgen(
            cls, cfg, temporal_vision_of, dropout=settings.dropout, num_frames=settings.num_frames,
            frame_pooling=settings.frame_pooling,
        )  # fmt: skip

    def part_of(self, name: str) -> str:
        temporal = name.startswith(("visual_encoder.temporal.", "frame_pool."))
        return "temporal" if temporal else super().part_of(name)

    def additions(self) -> list[set[str]]:
        """The temporal modules, of which an image model has none, the position embeddings, all zero at first, and the
        module of frame_pooling."""
        names = {name for name in self.state_dict() if name.startswith("visual_encoder.temporal.")}
        positions = {name for name in names if name.endswith(".positions")}
        pool = {name for name in self.state_dict() if name.startswith("frame_pool.")}
        return [names - positions, positions, pool, *super().additions()]

    def token_counts(self) -> str:
        each = self.visual_encoder.num_tokens
        out = getattr(self, "frame_pool", self.connector).num_output_tokens
        out *= self.num_frames if self.frame_pooling == "concat" else 1
        counts = f"{self.num_frames} frames of {each} visual -> {out} in the prompt"
        counts += f"{self.mean_words()} of a frame" if self.mean_words() else ""
        return f"{counts} (frame_pooling {self.frame_pooling}){self.drawn_words()}"

    def frame_tokens(self, image: Tensor) -> Tensor:
        """image (B, 3, T, H, W) or (B, 3, H, W) -> the ViT's tokens of each frame (B, T, L, D_v), T = 1 for a picture.

        Raises ValueError for another shape, and for clips that are not `num_frames` long.
        """
        frames = self._frames(image)  # (B, T, 3, H, W)
        batch, count = frames.shape[:2]
        flat = frames.flatten(0, 1)  # (B T, 3, H, W)
        tokens = self.visual_encoder(flat, count) if self.temporal else self.visual_encoder(flat)
        return tokens.unflatten(0, (batch, count))

    def _frames(self, image: Tensor) -> Tensor:
        if image.ndim == 4 and image.shape[1] == 3:
            return image[:, None]
        if image.ndim != 5 or image.shape[1] != 3:
            raise ValueError(
                f"image: of shape {tuple(image.shape)}; clips are (B, 3, T, H, W), colours before frames as LAVIS's "
                "video processors have them, and pictures (B, 3, H, W)"
            )
        if image.shape[2] not in (1, self.num_frames):
            raise ValueError(
                f"image: clips of {image.shape[2]} frames, but model.num_frames is {self.num_frames}: set it, or the "
                "number of frames of the video processors (num_frames; n_frms of LAVIS's), so that they agree"
            )
        return image.transpose(1, 2)

    def visual_tokens(self, image: Tensor) -> Tensor:
        """As `frame_tokens`; what that gave passes through."""
        whole = image.ndim == 4 and image.shape[2:] == (self.visual_encoder.num_tokens, self.visual_encoder.width)
        return image if whole else self.frame_tokens(image)

    def connect_seen(
        self, seen: Tensor, return_source: bool = False, budget: int | None = None, condition: Tensor | None = None
    ) -> VisualPrompt:
        """The ViT's tokens of each frame (B, T, L, D_v) -> the connector's of each clip (B, L', D_c).

        The source of `concat` maps the T L tokens of all frames to the T L' of the prompt; a token of `connector_mean`
        has one source in each frame, so there is no such map and it raises ValueError. Queries read all patches, so
        temporal_qformer and temporal_queries have no source. budget: of each pass of the connector. condition (B, D_l):
        of each clip, for all its frames.
        """
        count = seen.shape[1]
        pooled = self.frame_pooling in POOLED_FIRST
        if condition is not None and not pooled:
            condition = condition.repeat_interleave(count, 0)  # (B T, D_l)
        prompt = super().connect_seen(self.read_by_connector(seen), return_source, budget, condition)
        if pooled:
            return prompt if self.frame_pooling == "mean" else self.frame_pool(self.ln_vision(seen), prompt)
        if self.frame_pooling == "temporal_qformer":
            return self.frame_pool(prompt, count)
        return concatenated(prompt, count) if self.frame_pooling == "concat" else averaged(prompt, count)

    def read_by_connector(self, seen: Tensor) -> Tensor:
        """Frames' tokens (B, T, L, D_v) -> (B, L, D_v), or each frame's, (B T, L, D_v)."""
        return seen.mean(1) if self.frame_pooling in POOLED_FIRST else seen.flatten(0, 1)
