"""Bundles: a folder with what was trained (`model.safetensors`) and all that rebuilds the model (`config.json`).

config.json has LAVIS's two sections, `model` and `preprocess`, so a bundle is one more model type:
`load_model_and_preprocess("evlgen", FOLDER)` works as for the built-in ones. Frozen weights are named, not held.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lavis_evlgen import __version__
from lavis_evlgen.config import ConfigError, nearest
from lavis_evlgen.config.as_trained import STARTS
from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.config.values import refuse_unknown
from lavis_evlgen.errors import writing
from lavis_evlgen.reporting.run_card import plain
from lavis_evlgen.weights import hub
from lavis_evlgen.weights.frozen_identity import frozen_identity
from lavis_evlgen.weights.integrity import DIGESTS, sha256_of
from lavis_evlgen.weights.model_card import model_card
from lavis_evlgen.weights.sources import WeightsError, load_from_hub
from lavis_evlgen.weights.trainable import config_of_checkpoint, trainable_state
from lavis_evlgen.weights.untrusted import (
    USER_ONLY_KEYS,
    check_decoding,
    check_frozen_weights,
    check_plain,
    checked_model,
    read_json,
    shapes_in,
)

WEIGHTS, CONFIG, README, EXTRA = "model.safetensors", "config.json", "README.md", "extra.safetensors"
ADAPTER = "adapter"  # folder, of a language model with LoRA
FORMAT = 1


class Bundled:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a model that is built by `from_config`."""

    config: dict | None = None  # the `model` section it was built from
    preprocess: dict | None = None  # LAVIS's section: image and text processors
    decoding: dict | None = None  # arguments of `generate` that its run used

    def save_adapter(self, folder, weights: dict[str, torch.Tensor]):
        """Write what of a bundle's weights other tools can read alone; a model may have nothing of that kind."""

    def save_pretrained(self, folder, preprocess=None, decoding=None, card=None, **changes) -> Path:
        """Write a bundle; returns the folder.

        preprocess: LAVIS's section (default: the bundle's this model came from, else its model type's);
        decoding: arguments of `generate`; card: a run card (dict) for README.md; changes: keys of the model
        section that config.json should have otherwise, such as llm_model="facebook/opt-2.7b" for a local folder.
        """
        content, weights = bundle_config(self, preprocess, decoding, changes), trainable_state(self)
        folder = write_bundle(folder, weights, content, card)
        self.save_adapter(folder / ADAPTER, weights)
        return folder

    def push_to_hub(self, repo_id, private=None, token=None, commit_message=None, **saving) -> str:
        """Upload a bundle to the hub (the repository is made if need be); returns the commit's address.

        saving: as save_pretrained. A model folder of this machine is refused: it means nothing to others.
        """
        from huggingface_hub import HfApi

        preprocess, decoding, card = (saving.pop(key, None) for key in ("preprocess", "decoding", "card"))
        # a copy of LAVIS's download is a path of this machine, and others have the download
        content = bundle_config(self, preprocess, decoding, {"vit_path": None, **saving})
        local = local_sources(content["model"])
        if local:
            key, path = next(iter(local.items()))
            raise WeightsError(
                f"push_to_hub: model.{key} is {path}, a path of this machine that nobody else has; "
                f'give its public name: push_to_hub({repo_id!r}, {key}="owner/name")'
            )
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            weights = trainable_state(self)
            self.save_adapter(write_bundle(folder, weights, content, card, repo_id) / ADAPTER, weights)
            repo = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model").repo_id
            message = commit_message or f"lavis_evlgen {__version__}"
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))

    @classmethod
    def from_pretrained(cls, model_type: str, revision: str | None = None, **changes):
        """A built-in type, or the trained model of a bundle (folder, or owner/name on the hub) in eval mode.

        changes: keys of the model section to replace, such as llm_model="/my/opt-2.7b". Raises WeightsError when
        a frozen part is not the one that the bundle was trained with.
        """
        check_keys(cls, changes, "from_pretrained")
        if model_type in cls.PRETRAINED_MODEL_CONFIG_DICT:
            section = OmegaConf.load(cls.default_config_path(model_type)).model
            return cls.from_config(OmegaConf.create({**section, **changes}))
        other = next((key for key in STARTS if key in changes), None)
        if other is not None:
            raise ConfigError(f"from_pretrained: {other}: {model_type} brings its own weights; leave it out")
        folder = find_bundle(model_type, cls, revision)
        content = read_config(folder)
        _check_class(cls, content, folder)
        weights = {"pretrained": str(folder), "load_pretrained": True, "load_finetuned": False, "llm_adapter": None}
        model = cls.from_config(OmegaConf.create({**content["model"], **changes, **weights}))
        model.preprocess, model.decoding = content.get("preprocess"), content.get("decoding")
        return model.eval()

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """Where LAVIS finds the sections `model` and `preprocess`; a bundle brings its own."""
        if model_type in cls.PRETRAINED_MODEL_CONFIG_DICT:
            return super().default_config_path(model_type)
        folder = find_bundle(model_type, cls)
        read_config(folder)  # LAVIS reads its preprocess section from the file itself
        return str(folder / CONFIG)


def is_bundle(folder) -> bool:
    return all((Path(folder) / name).is_file() for name in (WEIGHTS, CONFIG))


def trained_section(path: str) -> dict:
    """The model section that weights were trained with: of a bundle (its folder or file) or of a run's checkpoint.

    {} where a file carries none, or is not there: loading it says what is wrong.
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == WEIGHTS else folder
    return read_config(folder)["model"] if is_bundle(folder) else config_of_checkpoint(path)


def find_bundle(source: str, cls, revision: str | None = None) -> Path:
    """The folder of a bundle: `source` itself, or a download from the hub. Raises WeightsError."""
    folder = Path(source).expanduser()
    types = ", ".join(cls.PRETRAINED_MODEL_CONFIG_DICT)
    if folder.is_dir():
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise WeightsError(f"{source!r} is no model type ({types}), no folder here, and no owner/name on the hub")
    from huggingface_hub import snapshot_download

    # never a pickle: these two files are all it needs
    download = {"allow_patterns": [CONFIG, WEIGHTS], "revision": revision}
    return Path(load_from_hub(snapshot_download, str(source), "model_type", **download))


def read_config(folder) -> dict:
    """config.json of a bundle; raises WeightsError when it is not one, is of a later format, or says what it may not
    (weights/untrusted.py)."""
    if not is_bundle(folder):
        raise WeightsError(
            f"{folder} is no bundle: it lacks {WEIGHTS} or {CONFIG}; of a run folder give a checkpoint in it, "
            f"or make a bundle: `evlgen export {folder} OUT`"
        )
    path = Path(folder) / CONFIG
    try:
        content = read_json(path, "bundle")
        version, arch = int(content["lavis_evlgen"]["bundle"]), content["model"]["arch"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is not the config of a bundle that lavis_evlgen wrote: {error!r}") from error
    if version > FORMAT:
        written = content["lavis_evlgen"].get("version")
        raise WeightsError(f"{path} was written by lavis_evlgen {written}, newer than {__version__}: update")
    section = checked_model(content["model"], str(path), shapes_in(Path(folder) / WEIGHTS))
    cls = registry.get_model_class(arch)
    if cls is None:
        raise WeightsError(f"{path}: model.arch {arch!r} is unknown{nearest(arch, registry.list_models())}")
    for key in ("preprocess", "frozen", "released"):
        if not isinstance(content.get(key), dict | None):
            raise WeightsError(f"{path}: {key} is no section of keys")
    if not all(isinstance(facts, dict) for facts in (content.get("frozen") or {}).values()):
        raise WeightsError(f"{path}: frozen holds what is no section of keys")
    check_decoding(content.get("decoding"), cls, str(path))
    check_frozen_weights(content.get("frozen_weights"), str(path))
    return content | {"model": section}


def _check_class(cls, content: dict, folder):
    section = content["model"]
    if registry.get_model_class(section["arch"]) is not cls:
        raise WeightsError(f"{folder} holds a {section['arch']}, which {cls.__name__} is not")
    check_keys(cls, section, f"{folder}/{CONFIG}, written by lavis_evlgen {content['lavis_evlgen'].get('version')}")


def check_keys(cls, section: dict, source: str):
    """Raises ConfigError for the first key of a model section that `cls` does not read."""
    refuse_unknown(section, keys_of(cls), f"{source}: ")


def bundle_config(model, preprocess=None, decoding=None, changes: dict | None = None) -> dict:
    """The content of config.json for a model that `from_config` built (on the meta device will do)."""
    if model.config is None:
        raise ValueError("this model was put together by hand and knows no config; build it by from_config")
    section = {k: v for k, v in model.config.items() if k not in (*STARTS, "opt_model")}
    section["arch"] = next(n for n, c in registry.mapping["model_name_mapping"].items() if c is type(model))
    section["llm_model"] = model.config.get("llm_model") or model.config["opt_model"]
    sizes = model.connector.sizes
    if sizes is not None:  # rebuilt from its sizes: the BERT that it started from need not be there
        section |= {"connector_init": None, "connector_sizes": sizes}
    check_keys(type(model), changes or {}, "save_pretrained")
    section |= changes or {}
    section = {k: v for k, v in section.items() if k not in USER_ONLY_KEYS}
    if preprocess is None:
        preprocess = model.preprocess or default_preprocess(type(model), section.get("model_type"), section)
    decoding = model.decoding if decoding is None else decoding
    return compose(section, preprocess, decoding, frozen_facts(model), frozen_weights=frozen_identity(model))


def compose(section: dict, preprocess: dict, decoding: dict | None, frozen: dict, **more) -> dict:
    """config.json, in plain JSON types."""
    about = {"bundle": FORMAT, "version": __version__}
    content = {"lavis_evlgen": about, "model": section, "preprocess": preprocess, "decoding": decoding or {}}
    return plain({**content, "frozen": frozen, **more})


def default_preprocess(cls, kind: str | None, section: dict) -> dict:
    """The `preprocess` section of the model type `kind`, for pictures of the model's size; {} for another type."""
    if kind not in cls.PRETRAINED_MODEL_CONFIG_DICT:
        logging.warning("no preprocess is known for this model: who loads the bundle must bring the image processor")
        return {}
    preprocess = plain(OmegaConf.load(cls.PRETRAINED_MODEL_CONFIG_DICT[kind]).preprocess)
    for stage in preprocess["vis_processor"].values():
        stage["image_size"] = section.get("image_size", stage["image_size"])
    return preprocess


def frozen_facts(model) -> dict:
    """What the trained parts rely on in the frozen ones."""
    llm = model.language_model.llm.config
    return {
        "vision encoder": {"width": model.visual_encoder.width, "leading tokens": model.visual_encoder.protected},
        "language model": {
            "model_type": llm.model_type, "width": model.language_model.width, "layers": llm.num_hidden_layers
        },
    }  # fmt: skip


def check_frozen(model, content: dict, source):
    """Raises WeightsError that names the first frozen part which is not what the bundle was trained with."""
    own, keys = frozen_facts(model), {"vision encoder": "vit_model", "language model": "llm_model"}
    for part, facts in (content.get("frozen") or {}).items():
        if part not in keys or set(facts) - set(own[part]):
            raise WeightsError(f"{source}/{CONFIG}: frozen.{part} tells what lavis_evlgen {__version__} does not know")
        here = {name: own[part][name] for name in facts}
        if here != facts:
            key = keys[part]
            raise WeightsError(
                f"{source} was trained with a {part} of {_words(facts)}; this one has {_words(here)}. "
                f"Set model.{key} to what it was trained with: {content['model'].get(key)}, or a copy of it"
            )


def _words(facts: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def local_sources(section: dict) -> dict[str, str]:
    """Model keys whose value is a path of this machine, not a public name."""
    keys = [key for key in ("vit_model", "vit_path", "llm_model", "connector_init") if section.get(key)]
    sources = {key: str(section[key]) for key in keys}
    return {k: v for k, v in sources.items() if v.startswith(("/", ".", "~")) or Path(v).exists()}


def write_bundle(folder, state: dict, content: dict, card: dict | None = None, name: str | None = None, extra=None):
    """Write the files of a bundle; `extra`: tensors that the model does not use. Returns the folder.

    Raises WeightsError for a folder that holds anything but a bundle.
    """
    folder = Path(folder).expanduser()
    before = [ADAPTER] if (folder / ADAPTER / "adapter_config.json").exists() else []  # of one that is written over
    before += hub.FILES if (folder / hub.PROCESSOR).exists() else []
    strange = [p.name for p in folder.glob("*") if p.name not in (WEIGHTS, CONFIG, README, EXTRA, *before)]
    if strange or folder.is_file():
        raise WeightsError(f"{folder} is no empty folder{f': it holds {strange[0]}' if strange else ''}; give another")
    for key, path in local_sources(content["model"]).items():
        logging.warning("%s: model.%s is %s, a path of this machine; elsewhere give another", CONFIG, key, path)
    check_plain(content, f"{folder}/{CONFIG}")  # what would be refused when it is read
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / file for file in (EXTRA, *before)):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    for file, tensors in ((WEIGHTS, state), (EXTRA, extra)):
        if tensors:
            whole = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
            with writing(folder / file):
                save_file(whole, folder / file, metadata={"format": "pt"})
    digests = {file: sha256_of(folder / file) for file in (WEIGHTS, EXTRA) if (folder / file).exists()}
    content = {**content, "lavis_evlgen": {**content["lavis_evlgen"], DIGESTS: digests}}
    numbers = sum(v.numel() for v in state.values())
    texts = {CONFIG: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}
    texts[README] = model_card(content, numbers, card, name)
    for file, text in texts.items():
        with writing(folder / file):
            (folder / file).write_text(text, encoding="utf-8")
    return folder


def differences(trained: dict, cfg: dict) -> list[str]:
    """Settings of a model config that weights were not trained with (`trained`: theirs), in words."""
    quiet = {*STARTS, "model_type", "connector_init", "connector_sizes", "lr_scale", "prompt_scale", "vit_path",
             "tokens"}  # fmt: skip
    both = [key for key in trained if key in cfg and key not in quiet and cfg[key] != trained[key]]
    return [f"{key}: {cfg[key]} here, {trained[key]} there" for key in both]


def empty_model(cls, section):
    """The model of a config with its shapes and no weights: only configs and tokenizers are read."""
    with torch.device("meta"):
        return cls.from_config(OmegaConf.create({**section, "pretrained": None, "load_finetuned": False}))
