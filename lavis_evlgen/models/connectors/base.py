"""What all connectors share: the interface, its result, and how a BERT folder is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.config.values import Range
from lavis_evlgen.nn import Budgets, MergeMap, TomeFormerConfig
from lavis_evlgen.nn.tomeformer import by_bert_names
from lavis_evlgen.weights.kept_sizes import sizes_of
from lavis_evlgen.weights.sources import WeightsError, load_from_hub, on_meta, read_state_dict, resolve
from lavis_evlgen.weights.untrusted import read_json

# names in `connector_sizes`, and what a BERT's config.json calls them
SIZES = {
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
}


class ConnectorSizes(TypedDict, total=False):
    """Sizes of a random connector; what is left out is bert-base's."""

    hidden_size: Annotated[int, Range(1, LARGEST["hidden_size"])]
    num_heads: Annotated[int, Range(1, LARGEST["num_heads"])]
    intermediate_size: Annotated[int, Range(1, LARGEST["intermediate_size"])]
    max_positions: Annotated[int, Range(1, LARGEST["max_positions"])]
    layer_norm_eps: Annotated[float, Range(0.0, 1.0)]


@dataclass(kw_only=True)
class BertSettings(Settings):
    """Keys of connectors whose body is a BERT."""

    connector_init: str | None = key(
        "BERT to start from (id or folder), or random; qformer also a checkpoint of LAVIS's blip2 or blip2_opt", None
    )
    connector_sizes: ConnectorSizes | None = key(
        f"sizes of a connector that starts at random: {', '.join(SIZES)} (bert-base's); a BERT or a checkpoint has its "
        "own", {},
    )  # fmt: skip
    num_layers: int | None = key(
        "layers of the TomeFormer or Q-Former", TomeFormerConfig.num_layers, at_least=1, at_most=LARGEST["num_layers"]
    )
    dropout: float | None = key(
        "dropout of the TomeFormer or Q-Former", TomeFormerConfig.dropout, at_least=0.0, at_most=0.99
    )


@dataclass
class VisualPrompt:
    """tokens (B, L', D_c); mask (B, L') where lengths differ, else None; source: which token each patch is in."""

    tokens: Tensor
    mask: Tensor | None = None
    source: MergeMap | None = None


class Connector(nn.Module):
    """`forward(visual_tokens (B, L, D_v), condition=None, return_source=False, features=None)` -> VisualPrompt.

    Its tokens are (B, L', D_c). `features` (B, L, D_v) is what the frozen ViT gave, before the LayerNorm that trains:
    merging by them does not move as training goes on.
    `width` is D_c, `num_output_tokens` L'. `condition` (B, D_l), the mean of a question's embeddings (zeros: no
    question), is accepted everywhere and read where the attribute `condition` is "question". `ln_vision_init`: weights
    for the LayerNorm in front of the connector, where the connector's own weights were trained behind one; else None.
    `sizes`: what `connector_sizes` must say for the same shapes without the weights that this one started from; None
    where there is nothing to say. `budgets`: of one that can leave several numbers of tokens in training (`forward`
    then takes `budget`, one of them); else None.
    `lengths_differ`: pictures have numbers of tokens of their own: L' is then the most, and a prompt has a mask, true
    for a row's first tokens; what follows is padding. `average_tokens` is what they have in the mean, `average_merges`
    the `tome_r` with which all would have it. `calibration_pictures`: how many pictures `calibrate` wants before an
    evaluation; 0: the connector has nothing to set by them.
    """

    ln_vision_init: dict[str, Tensor] | None = None
    sizes: dict | None = None
    budgets: Budgets | None = None
    lengths_differ: bool = False
    average_merges: list[int] | None = None
    calibration_pictures: int = 0
    condition: str = "none"  # none | question: what merging looks at beside the picture

    def __init__(self, width: int, num_output_tokens: int):
        super().__init__()
        self.width, self.num_output_tokens = width, num_output_tokens

    @property
    def average_tokens(self) -> int:
        return self.num_output_tokens

    def calibrate(self, batches: Iterable[Tensor]):
        """Set what evaluation decides by, from visual tokens (B, L, D_v) of pictures, on every rank as many; in eval
        mode. Called where `calibration_pictures` is not 0."""

    def calibrated(self) -> bool:
        """Whether an evaluation finds all that it decides by."""
        return True

    def read_questions(self, question_width: int):
        """Make what reads `condition`, which is so wide; called where `condition` is "question", before any forward."""
        raise NotImplementedError(f"{type(self).__name__} does not look at questions")

    def noise(self, num_tokens: int, input_width: int) -> Tensor:
        """Two pictures' visual tokens (2, L, D_v) at random, on which `prompt_scale` measures the output's size."""
        return torch.randn(2, num_tokens, input_width)

    @staticmethod
    def noise_of_groups(num_tokens: int, input_width: int) -> Tensor:
        """`noise` of a connector whose output is means of tokens: all tokens of a picture are the same.

        Those of a group are alike in photos; the mean of independent ones would be far smaller than the mean of theirs.
        """
        return F.layer_norm(torch.randn(2, 1, input_width), (input_width,)).expand(-1, num_tokens, -1)

    @staticmethod
    def part_of(name: str) -> str:
        """Which part of the model a parameter of the connector belongs to, for `lr_scale`."""
        return "connector"


def is_random(connector_init) -> bool:
    """Whether the config asks for fresh weights."""
    return not connector_init or connector_init == "random"


def bert_folder(connector_init: str) -> str:
    """Folder with config.json, weights and vocab.txt of a BERT: a folder or package path as it is, or a hub id's.

    Where a model is counted, of a hub id that is not here perhaps config.json alone (weights/kept_sizes.py).
    """
    source = sizes_of(resolve(connector_init, "connector_init"))
    if Path(source).exists():
        return source
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "vocab.txt", *([] if on_meta() else ["model.safetensors"])]
    return load_from_hub(snapshot_download, source, "connector_init", allow_patterns=patterns)


def bert_config(folder: str) -> dict:
    """The config.json of a BERT folder. Raises WeightsError where there is none."""
    file = Path(folder) / "config.json"
    if not file.exists():
        raise WeightsError(f"connector_init: {folder} has no config.json")
    return read_json(file, "connector_init")


def bert_state(folder: str) -> dict[str, Tensor]:
    """The weights of a BERT folder under BertModel's names."""
    return by_bert_names(read_state_dict(folder, "connector_init"))
