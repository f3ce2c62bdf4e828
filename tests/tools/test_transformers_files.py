"""`evlgen export --transformers`: plain transformers, without this package, has the same prompts and captions."""

import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from PIL import ExifTags, Image

from lavis_evlgen.config import ConfigError
from lavis_evlgen.media.images import open_image
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.processors.images import EvlgenImageEvalProcessor
from lavis_evlgen.tools import transformers_files
from lavis_evlgen.tools.export import write_model
from lavis_evlgen.weights.bundle import bundle_config
from lavis_evlgen.weights.hub.modeling_evlgen import EvlgenForConditionalGeneration
from lavis_evlgen.weights.hub.processing_evlgen import EvlgenImageProcessor, EvlgenProcessor
from lavis_evlgen.weights.trainable import trainable_state
from tests.run_tools import redraw
from tests.test_cli import evlgen
from tests.tiny import IMAGE_SIZE, pictures, tiny_clip, tiny_opt, tiny_siglip, tiny_tokenizer

PREPROCESS = {"vis_processor": {"eval": {"name": "evlgen_image_eval", "image_size": IMAGE_SIZE, "mean": "clip"}}}
DECODING = {"num_beams": 3, "max_length": 8, "min_length": 2, "length_penalty": 0.5, "repetition_penalty": 1.2}
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONVERSATION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a dog?"}]}]

# runs as if neither this package nor LAVIS nor peft were installed
ALONE = """
import sys, json

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("lavis", "lavis_evlgen", "peft", "tests")
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in ("lavis", "lavis_evlgen", "peft"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is there")
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

out = {}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    shown = [Image.open(path) for path in json.loads(sys.argv[2])]
    batch = processor(images=shown)
    asked = processor(images=shown, text=["a", "Question: what color is the square? Short answer:"])
    own = {"pixels": batch["pixel_values"], "features": model.get_image_features(batch["pixel_values"])}
    own["default"] = processor.batch_decode(model.generate(batch["pixel_values"]))
    own["greedy"] = processor.batch_decode(model.generate(**asked, num_beams=1))
    own["beams"] = processor.batch_decode(model.generate(**asked))
    own["logits"] = model(**asked).logits
    if processor.tokenizer.chat_template:
        chat = json.loads(sys.argv[3])
        own["chat"] = processor.apply_chat_template(chat, add_generation_prompt=True)
        chat[0]["content"][0]["image"] = shown[0]
        batch = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        own["embeds"] = model.prompt(**batch)[0]
    out[folder] = own
torch.save(out, sys.argv[4])
"""


def build(parts, **changes) -> EVLGen:
    """A model whose trainable weights are nobody's start."""
    section = {
        "arch": "evlgen", "model_type": "quickstart", **parts, "image_size": IMAGE_SIZE, "num_layers": 2,
        "vit_layer": None, "vit_precision": "fp32", "llm_precision": "fp32", "tome_r": {"target": 9},
        "bos": "after", **changes,
    }  # fmt: skip
    model = EVLGen.from_config(OmegaConf.create(section))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def export(model, folder, **changes):
    """As `evlgen export` writes the bundle of a checkpoint."""
    content = bundle_config(model, PREPROCESS, DECODING, changes)
    write_model(model, trainable_state(model), content, folder, transformers=True)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Frozen parts of other families; the language models have a chat template, and OPT's end token."""
    root = tmp_path_factory.mktemp("others")
    for name, model in {"opt": tiny_opt(), "clip": tiny_clip(), "siglip": tiny_siglip()}.items():
        redraw(model).save_pretrained(root / name)
    tokenizer = tiny_tokenizer(bos="</s>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "opt")
    return root


@pytest.mark.parametrize(
    "changes",
    [
        {"tome_r": 4},
        {"tome_r": [3, 1], "merge_mean": "size", "proportional_attention": True, "partition": "random"},
        {"tome_r": {"r": 3, "inflection": -1}, "skip": "pooled", "readout": "group", "merge_mean": "size"},
        {"merge_at": "input", "skip": "pooled", "readout": "group"},
        {"tome_r": {"elastic": [5, 9]}, "tokens": 6},
        {"soft_prompt": True, "vit_model": "clip", "vit_layer": -2},
        {"vit_model": "siglip", "connector": "avgpool", "num_query_token": 6, "vit_layer": 0},
        {"connector": "linear", "vit_precision": "bf16"},
        {"llm_train": "full"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_prompts_are_ours(parts, others, tmp_path, changes):
    vit = changes.get("vit_model")
    model = build(parts, **changes | ({"vit_model": str(others / vit)} if vit else {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.7)
    loaded = EvlgenForConditionalGeneration.from_pretrained(export(model, tmp_path / "b"))
    shown = pictures(3)
    expected, found = model.visual_prompt(shown).tokens, loaded.get_image_features(shown)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected, found = (lm(input_ids=ids).logits for lm in (model.language_model.llm, loaded.language_model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_alone_it_says_the_same(parts, others, tmp_path):
    """One process, three models: the run's own parts, OPT with LoRA beside the bundle, BOS in front."""
    opt = str(others / "opt")
    models = {
        tmp_path / "a": build(parts, prompt="a photo of", llm_train={"lora": {"rank": 2, "alpha": 8}}),
        others / "b": build({**parts, "llm_model": opt}, llm_train="lora"),
        tmp_path / "c": build(parts, bos="before", chat_template="plain"),
    }
    for folder, model in models.items():
        export(model, folder)
    assert json.loads((others / "b" / "config.json").read_text())["language_model"] == "../opt"
    paths = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    for n, path in enumerate(paths):
        Image.effect_mandelbrot((50, 40 + n), (-2, -1 + n, 1, 1.5), 60).convert("RGB").rotate(n * 90).save(path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    said = tmp_path / "said.pt"
    command = [sys.executable, "-c", ALONE, json.dumps([str(f) for f in models]), json.dumps(paths),
               json.dumps(CONVERSATION), str(said)]  # fmt: skip
    subprocess.run(command, check=True, env=env, cwd=tmp_path)
    found, process = torch.load(said), EvlgenImageEvalProcessor.from_config(PREPROCESS["vis_processor"]["eval"])
    pixels = torch.stack([process(Image.open(path)) for path in paths])
    texts = ["a", "Question: what color is the square? Short answer:"]
    for folder, model in models.items():
        own = found[str(folder)]
        torch.testing.assert_close(own["pixels"], pixels, rtol=0, atol=1e-5)
        prompt = model.visual_prompt(pixels)
        torch.testing.assert_close(own["features"], prompt.tokens, rtol=1e-5, atol=1e-5)
        assert own["default"] == model.generate({"image": pixels}, **DECODING)
        asked = {"image": pixels, "prompt": texts}
        assert own["greedy"] == model.generate(asked, **DECODING | {"num_beams": 1})
        assert own["beams"] == model.generate(asked, **DECODING) and len(set(own["beams"])) == 2
        lm = model.language_model
        _, nats = lm.token_log_probs(prompt.tokens[:1], "a dog", "a")
        first = own["logits"][0, -1].log_softmax(-1)[lm.text.encode(" dog")[0]]
        torch.testing.assert_close(first, nats[0], rtol=1e-4, atol=1e-4)
        if "chat" in own:
            front, _, behind = own["chat"].partition("<image>")
            rows = [[lm.text.encode(text)] for text in (front, behind)]
            embeds, *_ = lm._assemble(prompt.tokens[:1], None, rows[1], [0], rows[0])
            torch.testing.assert_close(own["embeds"], embeds, rtol=1e-5, atol=1e-5)
    assert found[str(others / "b")]["chat"] == "[user] <image>\na dog?</s>[assistant]"
    assert found[str(tmp_path / "c")]["chat"] == "<s>USER: <image>\na dog? "
    assert "chat" not in found[str(tmp_path / "a")]


def test_pictures_of_every_mode_are_read_as_ours(tmp_path):
    """Transparent, grey with 16 bits, with a palette, turned by EXIF."""
    noise = torch.randint(0, 256, (20, 30, 4), generator=torch.Generator().manual_seed(0)).byte().numpy()
    colours, turned = Image.fromarray(noise), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    shown = {"rgba": colours, "la": colours.convert("LA"), "p": colours.convert("RGB").quantize(16),
             "i16": Image.fromarray(noise[..., 0].astype("uint16") * 200), "l": colours.convert("L")}  # fmt: skip
    for name, picture in shown.items():
        picture.save(tmp_path / f"{name}.png")
    colours.convert("RGB").save(tmp_path / "turned.jpg", exif=turned)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    theirs, ours = EvlgenImageProcessor(size), EvlgenImageEvalProcessor(IMAGE_SIZE, mean="half")
    for path in tmp_path.iterdir():
        expected = ours(open_image(path))[None]
        assert torch.equal(theirs(Image.open(path))["pixel_values"], expected), path.name
    assert torch.equal(theirs([[noise[..., :3]]])["pixel_values"][0], ours(Image.fromarray(noise[..., :3])))


def test_prompts_that_cannot_be_are_named(parts, tmp_path):
    folder = export(build(parts), tmp_path / "b")
    model, tokenizer = EvlgenForConditionalGeneration.from_pretrained(folder), tiny_tokenizer()
    image = model.config.image_token_id
    processor = EvlgenProcessor(EvlgenImageProcessor(), tokenizer, "after", 0, 2, image)
    assert processor.ids("a <image> b") == [*tokenizer("a ").input_ids, image, *tokenizer(" b").input_ids]
    errors = {
        "1 texts for 2 pictures": lambda: model.prompt(pictures(2), torch.tensor([[image]])),
        "0 times; once is needed": lambda: model.prompt(pictures(1), torch.tensor([[5, 6]])),
        "quantization_config: not supported": lambda: model.from_pretrained(folder, quantization_config={"a": 1}),
        "says <image> 2 times": lambda: processor.ids("<image><image>"),
        "2 texts for 1 pictures": lambda: processor(Image.new("RGB", (9, 9)), ["a", "b"]),
        "images: left out": lambda: processor(text="a"),
        "a picture of type int": lambda: processor([1]),
    }
    for words, call in errors.items():
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(NotImplementedError, match="inference only"):
        model.save_pretrained(tmp_path / "c")


def test_the_command_writes_one_folder_for_both(finished, tmp_path, capsys):
    out = tmp_path / "b"
    command = ("export", finished.output(), out, "--transformers")
    assert evlgen(*command) == 0
    content = json.loads((out / "config.json").read_text())
    assert content["model_type"] == "evlgen" and content["language_model"] == "./language_model"
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card and 'AutoProcessor.from_pretrained("this/folder"' in card
    assert "pipeline_tag: image-to-text" in card and "model-index" in card and "license: " in card
    ours = EVLGen.from_pretrained(str(out))
    loaded = EvlgenForConditionalGeneration.from_pretrained(out)
    shown = pictures(2)
    torch.testing.assert_close(loaded.get_image_features(shown), ours.visual_prompt(shown).tokens)
    names = sorted(path.name for path in out.iterdir())
    assert evlgen(*command) == 0 and sorted(path.name for path in out.iterdir()) == names
    assert evlgen(*command[:-1]) == 0  # without: nothing of transformers is left
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert evlgen(*command, "--options", "model.llm_model=somebody/llm", "model.tokens=6") == 0
    content = json.loads((out / "config.json").read_text())
    assert content["language_model"] == "somebody/llm" and sum(content["connector"]["schedule"]) == 17 - 6
    assert not (out / "language_model").exists() and (out / "vision_model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"connector": "qformer", "num_query_token": 5}, "model.connector=qformer"),
        ({"tome_r": {"average": 9, "least": 6, "most": 12}}, "model.tome_r {average, least, most}"),
        ({"condition": "question"}, "model.condition=question"),
        ({"prompt_attention": "visual"}, "model.prompt_attention=visual"),
    ],
)
def test_what_is_not_supported_is_named(parts, tmp_path, changes, names):
    with pytest.raises(ConfigError) as error:
        export(build(parts, **changes), tmp_path / "b")
    assert f"export --transformers: {names} is not supported" in str(error.value)
    assert "Supported: arch evlgen" in str(error.value) and not (tmp_path / "b").exists()


def test_a_key_that_the_copied_code_does_not_follow_is_named(parts, tmp_path, monkeypatch):
    """As one that is new in the package, and has no line there yet."""
    monkeypatch.setattr(transformers_files, "FOLLOWED", transformers_files.FOLLOWED - {"skip"})
    with pytest.raises(ConfigError, match="export --transformers: model.skip=pooled is not supported"):
        export(build(parts, skip="pooled"), tmp_path / "b")


def test_other_parts_than_supported_ones_are_named(parts, tmp_path):
    model = build(parts)
    with pytest.raises(ConfigError, match="model.vit_model=eva_clip_g, which is a class of LAVIS, is not supported"):
        export(model, tmp_path / "b", vit_model="eva_clip_g")
    other = {"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": IMAGE_SIZE}}}
    content = bundle_config(model, other, DECODING)
    with pytest.raises(ConfigError, match="vis_processor.eval.name=blip_image_eval is not supported"):
        write_model(model, trainable_state(model), content, tmp_path / "b", transformers=True)
