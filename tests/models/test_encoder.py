"""Frozen vision encoders: which hidden state they read, how many tokens, and that they stay frozen."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lavis_evlgen.models.vision import encoder as vision
from lavis_evlgen.models.vision.encoder import VisionEncoder, eva_vit, load_vision_encoder, wrap_hugging_face
from lavis_evlgen.models.vision.eva_attention import FusedEvaAttention, fuse_attention
from lavis_evlgen.weights.sources import WeightsError
from tests.tiny import pictures, tiny_clip, tiny_dinov2, tiny_eva, tiny_lavis_clip, tiny_siglip, tiny_vision

KINDS = pytest.mark.parametrize("kind", [tiny_dinov2, tiny_clip, tiny_siglip])


@KINDS
@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -3])
def test_a_layer_is_hugging_faces_hidden_state(kind, layer):
    with torch.no_grad():
        expected = kind()(pictures(2), output_hidden_states=True).hidden_states[layer]
    encoder = tiny_vision(kind, layer=layer)
    torch.testing.assert_close(encoder(pictures(2)), expected, rtol=1e-5, atol=1e-5)
    assert encoder.width == 24


@KINDS
def test_no_layer_is_the_models_own_output(kind):
    with torch.no_grad():
        expected = kind()(pictures(2)).last_hidden_state
    torch.testing.assert_close(tiny_vision(kind)(pictures(2)), expected, rtol=1e-5, atol=1e-5)


@KINDS
def test_tokens_and_protected_tokens(kind):
    encoder = tiny_vision(kind)
    tokens = encoder(pictures(3))
    assert tokens.shape == (3, encoder.num_tokens, encoder.width) == (3, 17 - (kind is tiny_siglip), 24)
    assert encoder.protected == (0 if kind is tiny_siglip else 1)


def test_later_blocks_are_dropped_and_layers_outside_refused():
    encoder = tiny_vision(layer=1)
    assert len(encoder.vit.model.encoder.layer) == 1
    for layer in (4, -5):
        with pytest.raises(ValueError, match=f"vit_layer: {layer} is outside 0..3"):
            tiny_vision(layer=layer)


@KINDS
def test_another_picture_size_gives_more_tokens(kind):
    encoder = wrap_hugging_face(kind(), 42, "fp32", None)
    assert encoder.num_tokens - encoder.protected == 36
    assert encoder(pictures(1, size=42)).shape == (1, encoder.num_tokens, 24)


@KINDS
@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.15), ("fp16", 0.02)])
def test_short_precision_is_close_and_comes_out_float32(kind, precision, tolerance):
    exact, short = tiny_vision(kind)(pictures(2)), tiny_vision(kind, precision)(pictures(2))
    assert short.dtype == torch.float32
    assert 0 < (short - exact).norm() / exact.norm() < tolerance
    dtypes = {
        m.weight.dtype for m in tiny_vision(kind, precision).modules() if isinstance(m, torch.nn.Linear)
    }
    assert dtypes == {vision.DTYPES[precision]}


@KINDS
def test_frozen_is_frozen(kind):
    encoder = tiny_vision(kind).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(pictures(1).requires_grad_()).requires_grad


def test_eva_clips_attention_is_lavis_own_but_fused():
    """Outputs and gradients through the frozen blocks, as clips need them."""
    images, ours = pictures(2), tiny_eva()
    for parameter in ours.parameters():  # biases too, which begin at zero
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = copy.deepcopy(ours)
    VisionEncoder(ours, 24, 17, 1, "fp32")
    names = [name for name, module in ours.named_modules() if isinstance(module, FusedEvaAttention)]
    assert len(names) == len(ours.blocks) and list(ours.state_dict()) == list(theirs.state_dict())
    results = []
    for vit in (ours, theirs.eval()):
        leaf = images.clone().requires_grad_()
        tokens = vit(leaf)
        (gradient,) = torch.autograd.grad(tokens.square().sum(), leaf)
        results.append((tokens, gradient))
    for ours_, theirs_ in zip(*results, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=1e-5)


def test_attention_with_position_biases_stays_lavis_own():
    biased = eva_vit.Attention(24, num_heads=2, window_size=(4, 4))
    assert type(fuse_attention(biased)) is eva_vit.Attention


def test_unknown_precision():
    with pytest.raises(ValueError, match="vit_precision: 'int3' is not one of fp32, fp16, bf16"):
        tiny_vision(precision="int3")


@KINDS
def test_a_hugging_face_folder(kind, tmp_path):
    model = kind()
    model.save_pretrained(tmp_path)
    encoder = load_vision_encoder(str(tmp_path), 28, "fp32", vit_layer=2)
    with torch.no_grad():
        expected = model(pictures(2), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(encoder(pictures(2)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_of_a_two_tower_model_the_vision_half_is_read(family, layer, tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = getattr(transformers, family + "Config")(
        text_config=sizes | {"vocab_size": 60}, vision_config=sizes | {"image_size": 28, "patch_size": 7}
    )
    torch.manual_seed(0)
    getattr(transformers, family + "Model")(config).save_pretrained(tmp_path)
    half = getattr(transformers, family + "VisionModel").from_pretrained(tmp_path).eval()
    with torch.no_grad():
        output = half(pictures(2), output_hidden_states=True)
    expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
    encoder = load_vision_encoder(str(tmp_path), 28, "fp32", vit_layer=layer)
    torch.testing.assert_close(encoder(pictures(2)), expected, rtol=1e-5, atol=1e-5)


def test_a_missing_source_names_the_key(tmp_path):
    with pytest.raises(WeightsError, match="vit_model: .*absent.onnx does not exist"):
        load_vision_encoder(str(tmp_path / "absent.onnx"))
    with pytest.raises(ValueError, match="vit_path: only for eva_clip_g, clip_L"):
        load_vision_encoder(str(tmp_path), vit_path="x.pth")
    with pytest.raises(ValueError, match="vit_layer: eva_clip_g has one output"):
        load_vision_encoder("eva_clip_g", vit_layer=3)
    for layer in (0, 25, "23", True):
        with pytest.raises(ValueError, match=f"vit_layer: {layer!r} is outside 1..24, the blocks of clip_L"):
            load_vision_encoder("clip_L", vit_layer=layer)


BUILDERS = {"eva_clip_g": tiny_eva, "clip_L": tiny_lavis_clip}


@pytest.fixture(params=BUILDERS)
def lavis_vit(request, monkeypatch):
    """(name, reference): LAVIS's architecture in miniature in place of the big one, with random weights."""
    name = request.param
    _, file, resize = vision.LAVIS_VITS[name]
    monkeypatch.setitem(vision.LAVIS_VITS, name, (BUILDERS[name], file, resize))
    torch.manual_seed(0)
    reference = BUILDERS[name](56).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return name, reference


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("extra", [False, True])
def test_lavis_vits_load_from_a_file(lavis_vit, suffix, extra, tmp_path):
    name, reference = lavis_vit
    state, path = dict(reference.state_dict()), tmp_path / f"vit{suffix}"
    if extra:
        state["head.weight"] = torch.ones(3)  # downloads carry a last block and a head that LAVIS drops
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    encoder = load_vision_encoder(name, 56, "fp32", str(path))
    assert (encoder.width, encoder.num_tokens, encoder.protected) == (24, 17, 1)
    with torch.no_grad():
        expected = reference(pictures(2, size=56))
    assert expected.std() > 0.1
    torch.testing.assert_close(encoder(pictures(2, size=56)), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad or p.is_meta for p in encoder.parameters())
    assert not any(b.is_meta for b in encoder.buffers())


def test_lavis_vits_in_half_precision_and_another_size(lavis_vit, tmp_path):
    name, reference = lavis_vit
    half = {k: v.half() for k, v in reference.state_dict().items()}  # as the downloads are
    torch.save(half, tmp_path / "vit.pth")
    exact = reference(pictures(2, size=56)).detach()
    for precision in ("fp16", "bf16"):
        short = load_vision_encoder(name, 56, precision, str(tmp_path / "vit.pth"))(pictures(2, size=56))
        assert short.dtype == torch.float32
        assert (short - exact).norm() / exact.norm() < 0.1
    larger = load_vision_encoder(name, 84, "fp32", str(tmp_path / "vit.pth"))
    assert larger(pictures(2, size=84)).shape == (2, larger.num_tokens, 24) == (2, 37, 24)


def test_lavis_vits_name_what_is_wrong_with_a_file(lavis_vit, tmp_path):
    name, reference = lavis_vit
    path = tmp_path / "vit.pth"
    state = dict(reference.state_dict())
    first = next(k for k in state if k.endswith("weight"))
    short = {k: v for k, v in state.items() if k != first}
    torch.save(short, path)
    with pytest.raises(WeightsError, match=f"lacks 1 weights of {name}, first {first}"):
        load_vision_encoder(name, 56, "fp32", str(path))
    torch.save(state | {first: torch.ones(3, 2)}, path)
    with pytest.raises(WeightsError, match=f"vit_path: .*{first}.*"):
        load_vision_encoder(name, 56, "fp32", str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="vit_path: .*not a file of plain tensors"):
        load_vision_encoder(name, 56, "fp32", str(path))
    with pytest.raises(WeightsError, match="vit_path: .*does not exist"):
        load_vision_encoder(name, 56, "fp32", str(tmp_path / "absent.pth"))


def test_a_failed_download_says_what_to_do(lavis_vit, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(vision, "download_cached_file", offline)
    name, _ = lavis_vit
    with pytest.raises(
        WeightsError, match=f"vit_model {name}: cannot download .*no route.*set model.vit_path"
    ):
        load_vision_encoder(name, 56)


def test_the_real_architectures_have_the_released_shapes():
    for name, width, blocks in (("eva_clip_g", 1408, 39), ("clip_L", 1024, 21)):
        with torch.device("meta"), vision._LinspaceOnCPU():
            vit = vision.LAVIS_VITS[name][0](224)
        stack = vit.blocks if name == "eva_clip_g" else vit.transformer.resblocks
        assert (vit.num_features, len(stack)) == (width, blocks)
    with torch.device("meta"):
        assert [len(load_vision_encoder("clip_L", vit_layer=n).vit.transformer.resblocks) for n in (23, 24)] == [23, 24]
