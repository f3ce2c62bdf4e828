"""`model.llm_train`: the language model learns too, as a whole (`full`) or by low-rank adapters (`lora`, peft's).

What trains is float32 whatever the format of the frozen weights: half precision loses small updates. The language
model stays in eval mode (no dropout). At its start an adapter changes nothing: its second matrix is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lavis_evlgen.config.values import Range
from lavis_evlgen.weights.sources import WeightsError, check_floating, read_state_dict
from lavis_evlgen.weights.trainable import check_numbers
from lavis_evlgen.weights.untrusted import read_json

ALL_LINEAR = "all-linear"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
_PREFIX = "base_model.model."  # peft's, of a wrapped model; ours is not wrapped
_NAME = "default"  # of the adapter inside the model; peft leaves it out of files
# of an adapter's config: what would change the model otherwise than rank, alpha and targets say
_UNSUPPORTED = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "rank_pattern": {},
                "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None, "layer_replication": None,
                "exclude_modules": None, "trainable_token_indices": None, "lora_bias": False}  # fmt: skip


class LoraKeys(TypedDict, total=False):
    """model.llm_train.lora."""

    rank: Annotated[int, Range(1, 100_000)]
    alpha: Annotated[float, Range(0.0, 1e6)]
    targets: str | list[str]


class LlmTrain(TypedDict, total=False):
    """model.llm_train as a mapping."""

    lora: LoraKeys | None


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021): W x + alpha / rank * B A x, A (rank, in), B (out, rank)."""

    rank: int = 16
    alpha: float = 32
    targets: str | tuple[str, ...] = ALL_LINEAR  # names of linear layers, or all but the head


def training_of(value: str | LlmTrain | None) -> str | Lora | None:
    """model.llm_train, checked, as `make_trainable` takes it."""
    if value in (None, {}, "full"):
        return value or None
    keys = dict({} if value == "lora" else value["lora"] or {})
    targets = keys.get("targets")
    if isinstance(targets, str) and targets.isidentifier():  # one layer's name; to peft, text is a pattern
        targets = [targets]
    if isinstance(targets, list):
        keys["targets"] = tuple(sorted(targets))
    return Lora(**keys)


def make_trainable(llm: nn.Module, training: str | Lora | None, adapter: str | None = None):
    """Let a frozen language model learn as `training` says; adapter: a folder of peft's that LoRA starts from.

    Raises ValueError, and WeightsError for the adapter's files.
    """
    if adapter and not isinstance(training, Lora):
        raise ValueError(f"llm_adapter: {adapter} is a LoRA adapter, and llm_train is not lora; set llm_train=lora")
    if training is None:
        return
    if training == "full":
        llm.float().requires_grad_(True)
        return
    from peft import LoraConfig, inject_adapter_in_model

    targets = training.targets if isinstance(training.targets, str) else list(training.targets)
    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules=targets, lora_dropout=0.0,
                        bias="none", task_type="CAUSAL_LM")  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]):  # other parts are drawn as they would be without an adapter
            inject_adapter_in_model(config, llm)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, m in llm.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"llm_train.lora.targets: {targets!r} names no linear layer of {type(llm).__name__}; it has {names}"
        ) from error
    llm.requires_grad_(False)
    for name, parameter in llm.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    llm.eval()
    if adapter and next(llm.parameters()).device.type != "meta":
        load_adapter(llm, training, Path(adapter).expanduser())


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def _peft_name(name: str) -> str:
    """What peft's files call an adapter's parameter `name` of the language model."""
    return _PREFIX + name.replace(f".{_NAME}.", ".")


def adapter_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a language model's state dict, the adapter's tensors by the names they have in peft's files."""
    return {_peft_name(name): value.detach().cpu().contiguous() for name, value in state.items() if is_adapter(name)}


def save_adapter(llm: nn.Module, folder, base_model: str | None = None, state: dict[str, Tensor] | None = None) -> Path:
    """Write the adapter as peft does: `PeftModel.from_pretrained(language_model, folder)` has the same weights.

    base_model: the name that the language model goes by. state: the tensors, where `llm` is on the meta device (None:
    its own). Raises ValueError where there is no adapter.
    """
    config = (getattr(llm, "peft_config", None) or {}).get(_NAME)
    if config is None:
        raise ValueError("this language model has no adapter: model.llm_train is not lora")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path, config.inference_mode = base_model, True
    config.save_pretrained(str(folder))
    tensors = adapter_state(llm.state_dict() if state is None else state)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def load_adapter(llm: nn.Module, training: Lora, folder: Path):
    """Load an adapter that peft or `save_adapter` wrote. Raises WeightsError where it is not of these settings."""
    _check_adapter(training, folder)
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise WeightsError(f"llm_adapter: {file} does not exist")
    state, own = read_state_dict(str(file), "llm_adapter"), adapter_state(llm.state_dict())
    check_floating(state, own, str(file))
    wrong = sorted(set(state) ^ set(own)) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise WeightsError(
            f"llm_adapter: {file} is of another language model: {len(wrong)} tensors differ, first {wrong[0]}"
        )
    check_numbers(state, str(file))
    for name, parameter in llm.named_parameters():
        if is_adapter(name):
            parameter.copy_(state[_peft_name(name)])


def _check_adapter(training: Lora, folder: Path):
    """Raises WeightsError where adapter_config.json says another rank, alpha or targets, or what is not supported."""
    file = folder / ADAPTER_CONFIG
    content = read_json(file, "llm_adapter")
    if not isinstance(content, dict):
        raise WeightsError(f"llm_adapter: {file} is no adapter's config: it holds a {type(content).__name__}")
    for name, plain in _UNSUPPORTED.items():
        if content.get(name) not in (plain, None):
            raise WeightsError(f"llm_adapter: {file} has {name}={content[name]!r}, which is not supported")
    targets = content.get("target_modules")
    targets = tuple(sorted(map(str, targets))) if isinstance(targets, list) else targets
    found = {"rank": content.get("r"), "alpha": content.get("lora_alpha"), "targets": targets}
    for name, there in found.items():
        # peft writes the names that all-linear stood for: whether they are these, the tensors tell
        if there != getattr(training, name) and not (name == "targets" and training.targets == ALL_LINEAR):
            here = getattr(training, name)
            raise WeightsError(f"llm_adapter: {file} has {name} {there}, and model.llm_train.lora.{name} is {here}")
