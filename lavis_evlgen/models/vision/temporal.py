"""A frozen ViT that sees clips: temporal mixing after the attention residual and before the MLP of every block.

Every pre-norm block ends as `x = x + mlp(norm(x))`. A `BlockMixing` stands at two hooks of a block: in front of
`norm` it adds the mixing's change, so that the MLP sees mixed tokens, and it adds the same change to the block's
output, for the residual branch. So the block runs its own code on its own weights, whatever its MLP, scales or
release, and only two facts of each architecture are needed (BLOCKS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.models.vision.encoder import HuggingFaceViT, VisionEncoder, vision_of
from lavis_evlgen.nn import TemporalMixing
from lavis_evlgen.nn.temporal import RESIDUALS


@dataclass(kw_only=True)
class TemporalSettings(Settings):
    """Keys of a model config that say how a ViT sees clips."""

    num_frames: int = key(
        "frames of a clip, as many as the video processors take. Pictures are clips of one frame", 4, at_least=1,
        at_most=LARGEST["num_frames"],
    )  # fmt: skip
    temporal: bool = key("false: no temporal module, the frames meet in frame_pooling only", True)
    residual: Literal[RESIDUALS] | None = key(
        f"how the temporal module adds to a block: {', '.join(RESIDUALS)} (as released: gated)", "gated"
    )
    temporal_positions: bool = key(
        "true: a learned embedding of each frame's place, so that the order of frames can matter (as released: false)",
        False,
    )


class BlockKind(NamedTuple):
    """norm: name of the LayerNorm in front of the MLP; batch_dim: which dimension of the tokens is the batch."""

    norm: str
    batch_dim: int = 0


# module and class of a block: LAVIS's EVA-g and CLIP-L (whose tokens are (L, B, D)), Hugging Face's
BLOCKS = {
    "eva_vit.Block": BlockKind("norm2"),
    "clip_vit.ResidualAttentionBlock": BlockKind("ln_2", 1),
    "modeling_clip.CLIPEncoderLayer": BlockKind("layer_norm2"),
    "modeling_siglip.SiglipEncoderLayer": BlockKind("layer_norm2"),
    "modeling_dinov2.Dinov2Layer": BlockKind("norm2"),
}


def kind_of(block: nn.Module) -> BlockKind | None:
    """The entry of BLOCKS for this module, or None where it is no transformer block of a known ViT."""
    return BLOCKS.get(f"{type(block).__module__.rpartition('.')[2]}.{type(block).__name__}")


class BlockMixing:
    """The two hooks of one frozen block."""

    def __init__(self, encoder: TemporalVision, block: nn.Module, mixing: TemporalMixing):
        kind = kind_of(block)
        self.encoder, self.mixing, self.batch_dim, self.change = encoder, mixing, kind.batch_dim, None
        getattr(block, kind.norm).register_forward_pre_hook(self.before_mlp)
        # in front of the hook that reads a hidden layer, which must see mixed tokens
        block.register_forward_hook(self.after_block, prepend=True)

    def before_mlp(self, norm: nn.Module, args: tuple) -> tuple:
        (x,) = args
        tokens = x.movedim(self.batch_dim, 0)  # (B T, L, D)
        change = self.mixing.change(tokens.unflatten(0, (-1, self.encoder.frames))).flatten(0, 1)
        self.change = change.movedim(0, self.batch_dim)
        return (x + self.change,)

    def after_block(self, block: nn.Module, args: tuple, output):
        change, self.change = self.change, None
        if isinstance(output, tuple):  # in some releases of transformers
            return (output[0] + change, *output[1:])
        return output + change


class TemporalVision(VisionEncoder):
    """A VisionEncoder with `temporal.N`, the TemporalMixing of block N; the blocks themselves stay frozen.

    `forward(image (B T, 3, H, W), frames=T)` -> (B T, L, D_v) float32, with gradients to `temporal` and through the
    blocks between, none to the ViT's weights. The frames of a clip lie next to each other. residual: as
    TemporalMixing; max_frames: length of the position embeddings, None for none. Raises ValueError for a ViT whose
    blocks are not known.
    """

    def __init__(self, vision: VisionEncoder, residual: str = "gated", max_frames: int | None = None):
        super().__init__(vision.vit, vision.width, vision.num_tokens, vision.protected, vision.precision)
        blocks = [module for module in self.vit.modules() if kind_of(module)]
        _check_blocks(self.vit, blocks)
        self.frames = 1
        self.temporal = nn.ModuleList(TemporalMixing(vision.width, residual, max_frames) for _ in blocks)
        for block, mixing in zip(blocks, self.temporal, strict=True):
            BlockMixing(self, block, mixing)

    def forward(self, image: Tensor, frames: int = 1) -> Tensor:
        self.frames = frames
        try:
            return self.encode(image)
        finally:
            self.frames = 1


def _check_blocks(vit: nn.Module, blocks: list[nn.Module]):
    if not blocks:
        kind = type(getattr(vit, "model", vit)).__name__
        raise ValueError(
            f"vit_model: temporal mixing does not know the blocks of a {kind}; it knows {', '.join(BLOCKS)} "
            "(models/vision/temporal.py: BLOCKS), or set model.temporal=false"
        )
    if isinstance(vit, HuggingFaceViT) and vit.reads_embeddings:
        raise ValueError(
            "vit_layer: 0 reads the embeddings, in front of every block, so no temporal module would have an effect; "
            "choose a later layer, or set model.temporal=false"
        )


def temporal_vision_of(cfg) -> VisionEncoder:
    """The vision encoder that a model config (VisionSettings, TemporalSettings) names."""
    vision, settings = vision_of(cfg), TemporalSettings.read(cfg)
    if not settings.temporal:
        return vision
    return TemporalVision(vision, settings.residual, settings.num_frames if settings.temporal_positions else None)
