"""What all connectors share: the interface, its result, and how a BERT folder is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lavis_evlgen.nn import MergeMap
from lavis_evlgen.nn.tomeformer import by_bert_names
from lavis_evlgen.weights.sources import WeightsError, load_from_hub, on_meta, read_state_dict, resolve
from lavis_evlgen.weights.untrusted import read_json

# keys of `connector_sizes`, and what a BERT's config.json calls them
SIZES = {
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
}


@dataclass
class VisualPrompt:
    """tokens (B, L', D_c); mask (B, L') where lengths differ, else None; source: which token each patch is in."""

    tokens: Tensor
    mask: Tensor | None = None
    source: MergeMap | None = None


class Connector(nn.Module):
    """`forward(visual_tokens (B, L, D_v), condition=None, return_source=False)` -> VisualPrompt(tokens (B, L', D_c)).

    `width` is D_c, `num_output_tokens` L'. `condition` is accepted everywhere and used nowhere yet: merging that
    looks at the question would read it. `ln_vision_init`: weights for the LayerNorm in front of the connector, where
    the connector's own weights were trained behind one; else None. `sizes`: what `connector_sizes` must say for the
    same shapes without the weights that this one started from; None where there is nothing to say.
    """

    ln_vision_init: dict[str, Tensor] | None = None
    sizes: dict | None = None

    def __init__(self, width: int, num_output_tokens: int):
        super().__init__()
        self.width, self.num_output_tokens = width, num_output_tokens

    @staticmethod
    def part_of(name: str) -> str:
        """Which part of the model a parameter of the connector belongs to, for `lr_scale`."""
        return "connector"


def is_random(connector_init) -> bool:
    """Whether the config asks for fresh weights."""
    return not connector_init or connector_init == "random"


def bert_folder(connector_init: str) -> str:
    """Folder with config.json, weights and vocab.txt of a BERT: a folder or package path as it is, or a hub id's."""
    source = resolve(connector_init, "connector_init")
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
