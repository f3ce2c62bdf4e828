"""Released checkpoints, written here by the names of the released implementation: in, used, and back bit for bit."""

import json
import os

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import BertConfig, BertModel

from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.tools.convert import from_released
from lavis_evlgen.weights.sources import WeightsError
from tests.run_tools import redraw, same_tensors
from tests.test_cli import evlgen
from tests.tiny import pictures, tiny_connector, tiny_evlgen, tiny_opt, tiny_tokenizer

D_V, H, D_L, POSITIONS = 24, 16, 32, 512
TEXTS = {"text_input": ["a red square", "a photo of a dog"]}
OPTIONS = [
    "image_size=28", "vit_precision=fp32", "llm_precision=fp32", "tome_r=4", "connector_sizes.num_heads=2",
]  # fmt: skip


def checkpoint(projection: str = "opt_proj", layers: int = 2, hidden: int = 32) -> dict[str, torch.Tensor]:
    """A released state dict in miniature: every name is spelled as there, pooler and frozen weights included."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    def linear(name, inputs, outputs):
        return {f"{name}.weight": drawn(outputs, inputs), f"{name}.bias": drawn(outputs)}

    def norm(name, width):
        return {f"{name}.weight": 1 + drawn(width), f"{name}.bias": drawn(width)}

    llm = {"opt_proj": "opt_model.model.decoder.embed_tokens", "llm_proj": "llm_model.model.embed_tokens"}[projection]
    state = {
        "visual_encoder.cls_token": drawn(1, 1, D_V).half(),
        **linear("visual_encoder.blocks.0.attn.proj", D_V, D_V),
        **norm("ln_vision", D_V),
        **linear("VL_proj", D_V, H),
        "VLconnector.embeddings.position_ids": torch.arange(POSITIONS)[None],
        "VLconnector.embeddings.position_embeddings.weight": drawn(POSITIONS, H),
        "VLconnector.embeddings.token_type_embeddings.weight": drawn(2, H),
        **norm("VLconnector.embeddings.LayerNorm", H),
    }
    for i in range(layers):
        layer = f"VLconnector.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            state |= linear(f"{layer}.attention.self.{part}", H, H)
        state |= linear(f"{layer}.attention.output.dense", H, H) | norm(f"{layer}.attention.output.LayerNorm", H)
        state |= linear(f"{layer}.intermediate.dense", H, hidden) | linear(f"{layer}.output.dense", hidden, H)
        state |= norm(f"{layer}.output.LayerNorm", H)
    state |= linear("VLconnector.pooler.dense", H, H)
    return state | linear(projection, H, D_L) | {f"{llm}.weight": drawn(50, D_L).half()}


def trained(state: dict) -> dict:
    return {k: v for k, v in state.items() if not k.startswith(("visual_encoder.", "opt_model.", "llm_model."))}


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    """By projection: the `--options` that name a ViT and a language model of that family."""
    opt = tmp_path_factory.mktemp("opt")
    redraw(tiny_opt()).save_pretrained(opt)
    tiny_tokenizer(bos="</s>").save_pretrained(opt)
    llms = {"opt_proj": opt, "llm_proj": parts["llm_model"]}
    return {k: [f"model.{o}" for o in [*OPTIONS, f"vit_model={parts['vit_model']}", f"llm_model={llm}"]]
            for k, llm in llms.items()}  # fmt: skip


def save(state, folder, **more):
    torch.save({"model": state, **more}, folder / "released.pth")
    return folder / "released.pth"


def placed_by_hand(model: EVLGen, state: dict, projection: str):
    """Assign every tensor to the module it belongs to: no name is computed."""

    def put(module, name):
        own = [p for n, p in module.named_parameters() if n in ("weight", "bias")]
        for parameter, kind in zip(own, ("weight", "bias"), strict=False):
            parameter.data.copy_(state[f"{name}.{kind}"])

    body = model.connector.tomeformer
    put(model.ln_vision, "ln_vision")
    put(model.connector.input_proj, "VL_proj")
    put(model.llm_proj, projection)
    put(body.embeddings.position_embeddings, "VLconnector.embeddings.position_embeddings")
    put(body.embeddings.token_type_embeddings, "VLconnector.embeddings.token_type_embeddings")
    put(body.embeddings.LayerNorm, "VLconnector.embeddings.LayerNorm")
    for i, layer in enumerate(body.encoder["layer"]):
        name = f"VLconnector.encoder.layer.{i}"
        put(layer.attention["self"].query, f"{name}.attention.self.query")
        put(layer.attention["self"].key, f"{name}.attention.self.key")
        put(layer.attention["self"].value, f"{name}.attention.self.value")
        put(layer.attention["output"].dense, f"{name}.attention.output.dense")
        put(layer.attention["output"].LayerNorm, f"{name}.attention.output.LayerNorm")
        put(layer.intermediate["dense"], f"{name}.intermediate.dense")
        put(layer.output.dense, f"{name}.output.dense")
        put(layer.output.LayerNorm, f"{name}.output.LayerNorm")
    return model.eval()


@pytest.mark.parametrize("projection, kind", [("opt_proj", "opt"), ("llm_proj", "llama")])
def test_in_gives_the_loss_of_its_weights_and_back_is_bit_equal(projection, kind, folders, tmp_path, capsys):
    state = checkpoint(projection)
    state["ln_vision.bias"] = state["ln_vision.bias"].half()  # a file's own number formats come back too
    source, out, back = save(state, tmp_path, epoch=3), tmp_path / "bundle", tmp_path / "back.pth"
    assert evlgen("convert", source, out, "--options", *folders[projection]) == 0
    words = capsys.readouterr().out
    assert "used    VL_proj.weight  (16, 24) float32 -> connector.input_proj.weight" in words
    assert f"used    {projection}.bias  (32,) float32 -> llm_proj.bias" in words
    assert words.count("\nused    ") + words.startswith("used    ") == len(trained(state)) - 3
    for name in ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"):
        assert f"kept    VLconnector.{name}  " in words
    assert "left    visual_encoder.*  3 tensors" in words and f"left    {projection[:3]}_model.*  1 tensors" in words
    assert "used: 42 tensors" in words and "kept aside: 3 unused, 0 unknown" in words
    assert "left out, frozen: 4 tensors" in words and "tome_r 4 (" in words

    content = json.loads((out / "config.json").read_text())
    bos, penalty = {"opt_proj": (None, 1.0), "llm_proj": ("</s>", 1.5)}[projection]
    assert content["model"].get("bos_token") == bos
    assert content["decoding"] == {"num_beams": 5, "max_length": 30, "min_length": 8, "repetition_penalty": penalty}
    model = EVLGen.from_pretrained(str(out))
    assert model.language_model.text.bos_id == 2 and model.language_model.label_bos == (projection == "opt_proj")
    assert model.decoding == content["decoding"]
    vision = model.visual_encoder
    sizes = {"max_positions": POSITIONS, "layer_norm_eps": 1e-12}
    hand = EVLGen(vision, tiny_connector(vision, **sizes), model.language_model)
    hand = placed_by_hand(hand, state, projection)
    samples = {"image": pictures(2), **TEXTS}
    assert torch.equal(model(samples)["loss"], hand(samples)["loss"])
    assert model.language_model.llm.config.model_type == kind

    assert evlgen("convert", out, back, "--to", "released") == 0
    words = capsys.readouterr().out
    assert "missing visual_encoder.*" in words and "differs" not in words
    returned = torch.load(back, weights_only=True)["model"]
    assert same_tensors(returned, trained(state))
    assert {k: v.dtype for k, v in returned.items()} == {k: v.dtype for k, v in trained(state).items()}


def test_without_merging_it_is_hugging_faces_bert(folders, tmp_path):
    """An independent path: BertModel takes VLconnector by name, and Hugging Face computes the loss of the text."""
    state = checkpoint("llm_proj")
    evlgen("convert", save(state, tmp_path), tmp_path / "b", "--options", *folders["llm_proj"], "model.tome_r=0")
    model = EVLGen.from_pretrained(str(tmp_path / "b"))
    bert = BertModel(BertConfig(
        vocab_size=3, hidden_size=H, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=POSITIONS,
    )).eval()  # fmt: skip
    body = {k.removeprefix("VLconnector."): v for k, v in state.items() if k.startswith("VLconnector.")}
    assert bert.load_state_dict(body, strict=False).missing_keys == ["embeddings.word_embeddings.weight"]
    llm, text = model.language_model.llm, model.language_model.text
    with torch.no_grad():
        tokens = model.visual_encoder(pictures(1))
        tokens = nn.functional.layer_norm(tokens, (D_V,), state["ln_vision.weight"], state["ln_vision.bias"])
        tokens = bert(inputs_embeds=tokens @ state["VL_proj.weight"].T + state["VL_proj.bias"]).last_hidden_state
        prompt = tokens @ state["llm_proj.weight"].T + state["llm_proj.bias"]
        ids = torch.tensor([[text.bos_id, *text.encode("a red square"), text.end_id]])
        embeds = torch.cat([prompt, llm.get_input_embeddings()(ids)], 1)
        labels = torch.cat([torch.full((1, prompt.shape[1] + 1), -100), ids[:, 1:]], 1)
        expected = llm(inputs_embeds=embeds, labels=labels).loss
    loss = model({"image": pictures(1), "text_input": ["a red square"]})["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"mkdir {self.path}",)


@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_that_would_run_a_command_is_refused(inside, tmp_path, capsys):
    trap = tmp_path / "trap"
    state = checkpoint()
    save(state | {"VL_proj.weight": Malicious(trap)} if inside else state, tmp_path, config=Malicious(trap))
    assert evlgen("convert", tmp_path / "released.pth", tmp_path / "out") == 2
    words = capsys.readouterr()
    assert "a pickle that would run code" in words.err and words.err.startswith("evlgen convert: convert: ")
    assert not trap.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "released.pth", weights_only=False)  # the trap is armed
    assert trap.exists()


def without(*names):
    return lambda state: {k: v for k, v in state.items() if k not in names}


MISSING = "VLconnector.encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(
    "change, says",
    [
        (without(MISSING), "1 tensors are missing, first what is here connector.tomeformer.encoder.layer.1.output"),
        (lambda s: s | {"itc_head.weight": torch.zeros(2)}, "1 tensors are unknown: itc_head.weight; --allow-unknown"),
        (lambda s: s | {"llm_proj.weight": s["opt_proj.weight"]}, "must have one of opt_proj and llm_proj; it has o"),
        (without("opt_proj.weight"), "must have one of opt_proj and llm_proj; it has neither"),
        (without("VL_proj.weight"), "is not in the layout of released EVLGen checkpoints: it has no VL_proj.weight"),
        (lambda s: {"connector.input_proj.weight": s["VL_proj.weight"]}, "so it is in our layout already"),
        (lambda s: s | {MISSING: torch.zeros(3)}, "1 tensors have another shape"),
        (lambda s: s | {"VL_proj.scale": 3}, "VL_proj.scale is no tensor"),
    ],
)
def test_a_file_that_does_not_fit_is_one_message(change, says, folders, tmp_path, capsys):
    path = save(change(checkpoint()), tmp_path)
    assert evlgen("convert", path, tmp_path / "out", "--options", *folders["opt_proj"]) == 2
    words = capsys.readouterr().err
    assert says in words and len(words.splitlines()) == 1 and str(path) in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, says",
    [
        ([], "trained with a ViT of width 24, none of the paper's; say which: --options model.vit_model="),
        (["model.vit_model=x"], "a language model of width 32, none of the paper's; say which: --options model.llm_"),
        (["model.tomer=3"], "unknown key tomer; did you mean tome_r?"),
        (["tome_r=3"], "--options tome_r=3: give model.KEY=VALUE"),
        (["model.vit_model=x", "model.llm_model=y", "model.connector_sizes.num_heads=3"], "16 is not divisible by"),
        (["model.vit_model=x", "model.llm_model=y", "model.tome_r=[1]"], "tome_r"),
    ],
)
def test_what_the_file_does_not_tell_must_be_said_rightly(options, says, tmp_path, capsys):
    options = ["--options", *options] if options else []
    assert evlgen("convert", save(checkpoint(), tmp_path), tmp_path / "out", *options) == 2
    assert says in capsys.readouterr().err


def test_unknown_tensors_are_kept_aside_when_asked(folders, tmp_path, capsys):
    state = checkpoint("llm_proj") | {"itc_head.weight": torch.ones(2)}
    arguments = [save(state, tmp_path), tmp_path / "b", "--options", *folders["llm_proj"], "--allow-unknown"]
    assert evlgen("convert", *arguments) == 0
    assert "kept aside: 3 unused, 1 unknown" in capsys.readouterr().out
    EVLGen.from_pretrained(str(tmp_path / "b"))  # loads strictly all the same
    assert evlgen("convert", tmp_path / "b", tmp_path / "back.pth", "--to", "released") == 0
    assert same_tensors(torch.load(tmp_path / "back.pth", weights_only=True)["model"], trained(state))
    assert evlgen("convert", tmp_path / "b", tmp_path / "back.pth", "--to", "released") == 2
    assert "back.pth is there already" in capsys.readouterr().err


def test_a_model_trained_here_goes_to_the_released_layout(folders, tmp_path, capsys):
    """It has no pooler and settings that the released code does not have: both are said."""
    section = dict(option.removeprefix("model.").split("=", 1) for option in folders["opt_proj"])
    section = {k: int(v) if v.isdigit() else v for k, v in section.items() if not k.startswith("connector_sizes")}
    sizes = {"hidden_size": H, "num_heads": 2, "intermediate_size": 32, "max_positions": 64}
    more = {"connector_sizes": sizes, "num_layers": 2, "bos": "before", "label_bos": False}
    model = EVLGen.from_config(OmegaConf.create(section | more))
    model.save_pretrained(tmp_path / "b")
    assert evlgen("convert", tmp_path / "b", tmp_path / "back.pth", "--to", "released") == 0
    words = capsys.readouterr().out
    assert "missing VLconnector.pooler.*" in words and "differs bos=before: the released code has after only" in words
    assert "differs label_bos=False: the released code has True only" in words and "bos_token" not in words
    names = set(trained(checkpoint())) - {"VLconnector.embeddings.position_ids"}
    written = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert set(written) == {name for name in names if ".pooler." not in name}
    assert torch.equal(written["opt_proj.weight"], model.llm_proj.weight)


@pytest.mark.parametrize("option", ["merge_at=input", "readout=group", "skip=pooled"])
def test_what_the_released_code_does_not_compute_is_refused(option, folders, tmp_path, capsys):
    path = save(checkpoint("llm_proj"), tmp_path)
    assert evlgen("convert", path, tmp_path / "b", "--options", *folders["llm_proj"]) == 0
    file, (key, value) = tmp_path / "b" / "config.json", option.split("=")
    content = json.loads(file.read_text())
    content["model"][key] = value
    file.write_text(json.dumps(content))
    assert evlgen("convert", tmp_path / "b", tmp_path / "back.pth", "--to", "released") == 2
    assert f"trained with model.{option}, which the released code does not have" in capsys.readouterr().err
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("layers", [12, 6])
@pytest.mark.parametrize("kind, projection", {v: k for k, v in from_released.TYPES.items()}.items())
def test_the_papers_sizes_are_known(kind, projection, layers, monkeypatch):
    """At full size, without memory: the file's shapes choose model type, ViT and language model."""
    monkeypatch.setattr("tests.tools.test_convert.H", 768)
    monkeypatch.setattr("tests.tools.test_convert.D_V", 1408)
    monkeypatch.setattr("tests.tools.test_convert.D_L", projection[1])
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None: torch.empty(shape, device="meta"))
    state = checkpoint(projection[0], layers, hidden=3072)
    monkeypatch.setattr(from_released, "read_state_dict", lambda path, what: state)
    _, config, _, report = from_released.from_released("x.pth", EVLGen)
    section, default = config["model"], EVLGen.default_config_path(kind)
    assert section["model_type"] == kind and section["vit_model"] == "eva_clip_g"
    assert section["llm_model"] in open(default).read() and section["num_layers"] == layers
    assert section["connector_sizes"] == {
        "hidden_size": 768, "num_heads": 12, "layer_norm_eps": 1e-12, "max_positions": 512, "intermediate_size": 3072,
    }  # fmt: skip
    assert config["preprocess"]["vis_processor"]["eval"] == {"name": "blip_image_eval", "image_size": 224}
    tokens = 257 - 19 * layers
    assert f"tome_r 19 (257 -> {tokens} tokens), num_heads 12" in report.lines()[-1]


@pytest.mark.parametrize("options, vit", [({}, ("clip_L", 23)), ({"vit_layer": 21}, ("clip_L", 21)),
                                          ({"vit_model": "./another"}, ("./another", None))])  # fmt: skip
def test_the_released_clip_runs_23_blocks(options, vit, monkeypatch):
    """LAVIS's class drops two more of the 24 than the released code does."""
    for name, size in (("H", 768), ("D_V", 1024), ("D_L", 2560)):
        monkeypatch.setattr(f"tests.tools.test_convert.{name}", size)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None: torch.empty(shape, device="meta"))
    state = checkpoint("opt_proj", 12, hidden=3072)
    monkeypatch.setattr(from_released, "read_state_dict", lambda path, what: state)
    section = from_released.from_released("x.pth", EVLGen, options)[1]["model"]
    assert (section["vit_model"], section.get("vit_layer")) == vit


def test_as_pretrained_it_is_sent_to_convert(tmp_path):
    path = save(checkpoint(), tmp_path)
    with pytest.raises(WeightsError, match=f"is in the released layout .* `evlgen convert {path} OUT`"):
        tiny_evlgen().load_checkpoint(str(path))
