"""What the values of a model section may be: lavis_evlgen/config/values.py says how these tables are read."""

from __future__ import annotations

from collections.abc import Iterable

from lavis_evlgen.models.connectors import CONNECTORS
from lavis_evlgen.models.precision import PRECISIONS


class VisionValues:
    """The tables of a model that has a vision encoder; of EVLGen and of BLIP-2's first stage."""

    NUMBERS = {
        "image_size": (14, 10_000), "vit_layer": (-1000, 1000), "num_query_token": (1, 100_000),
        "max_txt_len": (3, 100_000), "dropout": (0.0, 0.99),
    }  # fmt: skip
    SWITCHES: tuple[str, ...] = ("load_pretrained", "load_finetuned", "freeze_vit", "trust_remote_code")
    CHOICES: dict[str, tuple] = {"vit_precision": PRECISIONS}
    TEXTS: tuple[str, ...] = ("arch", "model_type", "pretrained", "vit_model", "vit_path", "connector_init")
    OPTIONAL: tuple[str, ...] = ("pretrained", "vit_path", "vit_layer", "num_query_token", "dropout")


def lr_scales(parts: Iterable[str]) -> dict[str, tuple]:
    """The item of `lr_scale` in MAPPINGS."""
    return dict.fromkeys(parts, (0.0, 1e6))


class EvlgenValues(VisionValues):
    """The tables of EVLGen; `lr_scale` is the model's own, which knows its parts."""

    NUMBERS = {
        **VisionValues.NUMBERS, "num_layers": (1, 1000), "tome_r": (0, 10_000), "prompt_scale": (1e-6, 1e6),
        "drop_path_rate": (0.0, 1.0),
    }  # fmt: skip
    SWITCHES = (*VisionValues.SWITCHES, "use_grad_checkpoint", "proportional_attention", "soft_prompt", "label_bos")
    CHOICES = {
        **VisionValues.CHOICES,
        "llm_precision": PRECISIONS,
        "connector": tuple(CONNECTORS),
        "merge_mean": ("plain", "size"),
        "partition": ("alternate", "random"),
        "bos": ("before", "after"),
        "prompt_scale": ("released", "embedding"),
    }
    TEXTS = (*VisionValues.TEXTS, "finetuned", "llm_model", "opt_model", "prompt", "bos_token")
    LISTS = {"tome_r": (0, 10_000)}
    MAPPINGS = {
        "tome_r": {"r": (0, 10_000), "inflection": (-1.0, 1.0), "target": (1, 100_000)},
        "connector_sizes": {
            "hidden_size": (1, 100_000), "num_heads": (1, 10_000), "intermediate_size": (1, 10**6),
            "max_positions": (1, 10**6), "layer_norm_eps": (0.0, 1.0),
        },
    }  # fmt: skip
    OPTIONAL = (
        *VisionValues.OPTIONAL, "finetuned", "connector", "connector_init", "connector_sizes", "num_layers", "tome_r",
        "merge_mean", "partition", "proportional_attention", "llm_model", "opt_model", "prompt", "lr_scale",
        "bos_token", "label_bos",
    )  # fmt: skip
