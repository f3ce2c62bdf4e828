"""Which frozen weights trained ones belong to: a few values of a few tensors, kept beside them and compared at loading.

Values rather than a hash, so that the same weights in another number format are still known; names and configs alone
change between releases of a library, and a folder can hold another model of the same width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import is_kept

TENSORS, VALUES = 8, 16  # of each part, spread over its tensors; of each of those, spread over its values
# bf16 has 8 bits of mantissa: rounding moves a value by a 256th at most, and the other one may be rounded too
ROUNDING = 2**-7
# not compared: position embeddings that are resized to the picture when they are loaded (LAVIS's ViTs); poolers, of
# which no output is read: many files have none, and it is then drawn at random; adapters that no stage has trained yet
NOT_THE_FILES = re.compile(r"(^|\.)(pos_embed|positional_embedding|pooler|lora_A|lora_B)(\.|$)")

Identity = dict[str, dict]


@torch.no_grad()
def frozen_identity(model: nn.Module, also: Iterable[str] = ()) -> Identity:
    """{part: {"dtype", "values": {tensor: [16 numbers]}}} of the model's frozen parameters; {} on the meta device.

    A part is a child module, such as visual_encoder and language_model; "dtype" names all its number formats. also:
    parts that are told where nothing of them is frozen, too.
    """
    frozen: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or NOT_THE_FILES.search(name):
            continue
        part, _, rest = name.partition(".")
        parts = trained if is_kept(parameter) else frozen
        # peft's name for a weight with an adapter beside it: the weight is the same
        parts.setdefault(part, {})[rest.replace(".base_layer.", ".")] = parameter
    told = {part: tensors for part, tensors in trained.items() if part in also} | frozen
    return {part: _identity_of(tensors) for part, tensors in told.items()}


def _identity_of(tensors: dict[str, Tensor]) -> dict:
    matrices = sorted(name for name, tensor in tensors.items() if tensor.ndim > 1) or sorted(tensors)
    names = list(dict.fromkeys(matrices[i * (len(matrices) - 1) // (TENSORS - 1)] for i in range(TENSORS)))
    values = {}
    for name in names:
        flat = tensors[name].detach().flatten()
        indices = torch.linspace(0, len(flat) - 1, VALUES, dtype=torch.float64, device="cpu").long()
        values[name] = flat[indices.to(flat.device)].float().cpu().tolist()
    # norms and embeddings of a ViT stay float32 whatever its precision: one tensor does not tell it
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return {"dtype": ", ".join(dtypes), "values": values}


def other_parts(trained: Identity, here: Identity) -> list[str]:
    """The parts whose frozen weights differ from those of training; parts that one side lacks are left out."""
    return [part for part in trained if part in here and _differ(trained[part], here[part])]


def _differ(trained: dict, here: dict) -> bool:
    """Values must be equal in the same number formats, and equal but for rounding in others."""
    slack = 0.0 if trained["dtype"] == here["dtype"] else ROUNDING
    for name in set(trained["values"]) & set(here["values"]):
        for a, b in zip(trained["values"][name], here["values"][name], strict=False):
            if abs(a - b) > slack * max(abs(a), abs(b)) + (1e-6 if slack else 0.0):
                return True
    return False


# config keys that name a part's weights
NAMED_BY = {"visual_encoder": ("vit_model", "vit_path"), "language_model": ("llm_model", "opt_model")}


def check_identity(model: nn.Module, identity: Identity, trained: dict, config: dict, source: str):
    """Compare the model's frozen parts with those that the weights at `source` were trained with.

    trained, config: the model sections of the weights and of this model. A part that `config` gives
    another name was chosen by the user, and is logged; one of the same name with other weights raises WeightsError.
    """
    # what was frozen then is not in the weights' file: where it trains now, it starts as its own files have it
    for part in other_parts(identity, frozen_identity(model, also=identity)):
        keys = NAMED_BY.get(part, ())
        there, here = ([section[key] for key in keys if section.get(key)] for section in (trained, config))
        if there != here:
            logging.warning("%s was trained with another %s: %s there, %s here", source, part, there, here)
        else:
            raise WeightsError(
                f"{source} was trained with another {part} than the one here, though both are "
                f"{' '.join(here) or 'of one name'}: the files behind that name have changed. Give the ones it was "
                f"trained with, by {' or '.join(f'model.{key}' for key in keys) or 'the model section'}"
            )
