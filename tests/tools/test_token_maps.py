"""Merged-token pictures: every patch in one token, colours found before training, layers composed, words attributed."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.connectors import build_connector
from lavis_evlgen.models.connectors.pooling import AveragePooling
from lavis_evlgen.processors.images import EvlgenImageEvalProcessor
from lavis_evlgen.tools.tokens import STYLES, plots
from lavis_evlgen.tools.tokens.maps import TokenMap, layer_maps, shown, untrained, words_of
from tests.models.test_quickstart_parts import missing
from tests.test_cli import evlgen
from tests.tiny import IMAGE_SIZE, pictures, tiny_evlgen, tiny_siglip, tiny_vision

COLOURS = ((200, 30, 30), (30, 160, 40), (30, 60, 200), (240, 220, 60))


def quadrants(size: int) -> Image.Image:
    """Four flat colours, the borders between them on borders between patches."""
    half, image = size // 2, Image.new("RGB", (size, size))
    for n, colour in enumerate(COLOURS):
        image.paste(colour, (n % 2 * half, n // 2 * half, (n % 2 + 1) * half, (n // 2 + 1) * half))
    return image


def spanning(found: TokenMap) -> list[int]:
    """Tokens with patches in more than one quadrant."""
    rows, columns = found.cells.shape
    row, column = np.indices(found.cells.shape)
    quadrant = 2 * (row >= rows // 2) + (column >= columns // 2)
    return [token for token in np.unique(found.cells) if len(set(quadrant[found.cells == token])) > 1]


def maps_of(model, image):
    return layer_maps(model.visual_encoder, model.ln_vision, model.connector, image)


@pytest.mark.parametrize("vision", [tiny_vision, lambda: tiny_vision(tiny_siglip)])
@pytest.mark.parametrize("connector", [{}, {"tome_r": [5, 0]}, {"merge_mean": "size", "partition": "random"}])
def test_every_patch_is_in_exactly_one_token(vision, connector):
    model = tiny_evlgen(vision=vision(), connector=connector).eval()
    maps = maps_of(model, pictures(1))
    protected = model.visual_encoder.protected
    for found in maps:
        assert found.cells.shape == (4, 4) and found.protected == protected
        held = set(range(protected, found.num_tokens))  # [CLS] has no patch, every other token has
        assert set(found.cells.ravel()) == held and found.sizes().sum() == 16
    assert len(maps) == 3 and maps[-1].num_tokens == model.connector.num_output_tokens


def test_layers_compose_as_indices_followed_by_hand(monkeypatch):
    model, steps = tiny_evlgen(connector={"num_layers": 3}).eval(), []
    for layer in model.connector.tomeformer.encoder["layer"]:
        layer.register_forward_hook(lambda module, given, output: steps.append(output[1].slot[0].tolist()))
    image = pictures(1, seed=3)
    maps = maps_of(model, image)
    for patch in range(16):
        place = patch + 1  # after [CLS]
        for step, found in zip(steps, maps[1:], strict=True):
            place = step[place]
            assert found.cells.ravel()[patch] == place
    source = model.visual_prompt(image, return_source=True).source
    assert (source.slot[0, 1:].numpy() == maps[-1].cells.ravel()).all()


@pytest.mark.skipif(bool(missing), reason=f"extra `quickstart` lacks {', '.join(missing)}")
def test_four_colours_are_regions_before_any_training():
    """The quickstart's real ViT and a TomeFormer as it is drawn: what is alike merges, down to 29 tokens."""
    from lavis_evlgen.models.evlgen import EVLGen
    from lavis_evlgen.models.vision.encoder import vision_of

    section = OmegaConf.load(EVLGen.default_config_path("quickstart")).model
    vision = vision_of(section)
    image = EvlgenImageEvalProcessor(224)(quadrants(224))[None]
    for seed in (0, 1, 42):
        maps = layer_maps(vision, *untrained(vision, OmegaConf.to_container(section), seed), image)
        assert [found.num_tokens for found in maps] == [257, 217, 177, 137, 97, 57, 29]
        assert [spanning(found) for found in maps] == [[]] * 7


class ColoursAlone(torch.nn.Module):
    """[CLS] and the patch embedding of a tiny DINOv2: no places, no blocks."""

    protected = 1

    def __init__(self, vision):
        super().__init__()
        self.embeddings = vision.vit.model.embeddings

    def forward(self, image):
        return torch.cat([self.embeddings.cls_token, self.embeddings.patch_embeddings(image)], 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_four_colours_are_regions_for_a_vit_that_sees_colours_alone(seed):
    """Patches of one colour are one and the same token: 16 become 8, and none mixes colours, whatever is drawn."""
    model = tiny_evlgen(seed=seed, connector={"tome_r": [8, 0]}).eval()
    torch.nn.init.zeros_(model.connector.tomeformer.embeddings.position_embeddings.weight)
    image = EvlgenImageEvalProcessor(IMAGE_SIZE)(quadrants(IMAGE_SIZE))[None]
    maps = layer_maps(ColoursAlone(model.visual_encoder), model.ln_vision, model.connector, image)
    assert [found.num_tokens for found in maps] == [17, 9, 9] and spanning(maps[-1]) == []


def test_the_test_of_regions_can_fail():
    cells = np.arange(16).reshape(4, 4)
    assert spanning(TokenMap(cells, 16, 0)) == []
    cells[0, 2] = cells[0, 1]
    assert spanning(TokenMap(cells, 16, 0)) == [1]


def test_mean_colours():
    picture = np.zeros((5, 4, 3))
    picture[:2, :2], picture[2:4, 2:] = 0.4, 0.8  # the fifth row belongs to no patch
    found = TokenMap(np.array([[1, 2], [2, 1]]), 3, 1)
    means = found.mean_colours(picture)
    assert np.allclose(means[0, 0], 0.6) and np.allclose(means[1, 1], 0.6) and np.allclose(means[0, 1], 0)
    assert found.sizes().tolist() == [2, 2]


def test_the_picture_is_what_the_model_sees():
    processor = EvlgenImageEvalProcessor(IMAGE_SIZE)
    image = quadrants(IMAGE_SIZE)
    assert np.allclose(shown(processor(image), processor), np.asarray(image) / 255, atol=1e-6)
    with pytest.raises(ConfigError, match="int normalises in a way"):
        shown(processor(image), 3)


def test_words_rely_on_tokens_as_finite_differences_say():
    """Reliance is |g . x|: scaling a token by 1 + e changes the log-probability by e g . x."""
    model = tiny_evlgen(prompt="a photo of").eval()
    image, caption = pictures(1), "two cats sleep"
    words = words_of(model, image, caption)
    assert [word.text for word in words] == caption.split()
    tokens, texts = model.visual_prompt(image).tokens.detach(), ["two", "two cats"]
    assert [word.reliance.sum() for word in words] == pytest.approx([1.0] * 3)

    def log_prob(prompt):  # of "cats", by the training loss of whole captions
        _, log_probs = model.language_model.token_log_probs(prompt, caption, model.prompt)
        ids = model.language_model.text.encode(" " + caption)
        first, second = (len(model.language_model.text.encode(" " + text)) for text in texts)
        assert len(ids) + 1 == len(log_probs)
        return log_probs[first:second].sum().item()

    changes = []
    for n in range(tokens.shape[1]):
        up, down = tokens.clone(), tokens.clone()
        up[:, n] *= 1.01
        down[:, n] *= 0.99
        changes.append(abs(log_prob(up) - log_prob(down)) / 0.02)
    assert words[1].reliance == pytest.approx(np.array(changes) / sum(changes), abs=2e-3)
    assert words[1].log_prob == pytest.approx(log_prob(tokens), abs=1e-4)


def test_log_probs_are_the_losses():
    model = tiny_evlgen(llm="opt", bos="before", prompt="a photo of").eval()
    tokens = model.visual_prompt(pictures(1)).tokens
    ids, log_probs = model.language_model.token_log_probs(tokens, "two cats", model.prompt)
    sums, count = model.language_model.loss(tokens, ["two cats"], [model.prompt])
    assert -log_probs.sum().item() == pytest.approx(sums.item(), rel=1e-5) and len(ids) == count.item()


def test_connectors_without_layers_and_without_a_map():
    vision = tiny_vision()
    pool = AveragePooling(vision.width, vision.num_tokens, vision.protected, 5)
    first, last = layer_maps(vision, torch.nn.Identity(), pool, pictures(1))
    assert first.num_tokens == 17 and last.cells.tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    sizes = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    qformer = build_connector(vision, {"connector": "qformer", "connector_sizes": sizes, "num_layers": 2})
    with pytest.raises(ConfigError, match="QFormerConnector has no source map.*tomeformer"):
        layer_maps(vision, torch.nn.Identity(), qformer, pictures(1))


@pytest.mark.filterwarnings("error::UserWarning")
def test_pictures_are_drawn(tmp_path):
    picture, cells = np.random.default_rng(0).random((28, 28, 3)), np.repeat([[1, 2], [2, 3]], 2, 0).repeat(2, 1)
    maps = [TokenMap(np.arange(16).reshape(4, 4), 16, 0), TokenMap(cells, 4, 1)]
    for style in STYLES:
        png, svg = plots.overview(
            tmp_path / style, picture, {"before training": maps[0], "trained": maps[1]}, style, "a caption with $x_1$"
        )
        sheet = np.asarray(Image.open(png).convert("RGB"))
        assert sheet.std() > 10 and sheet.shape[1] == 1560
        assert ET.parse(svg).getroot().tag.endswith("svg")
    drawn = {path.suffix: path for path in plots.layers_strip(tmp_path / "l", picture, maps, "mean")}
    with Image.open(drawn[".gif"]) as gif:
        assert gif.n_frames == 2 and gif.size == (320, 350)
        first = np.asarray(gif.convert("RGB"), float)
        gif.seek(1)
        assert np.abs(first - np.asarray(gif.convert("RGB"), float)).max() > 50


def test_borders_are_between_tokens():
    lines = plots._borders(np.array([[1, 1], [2, 1]]), "white", 1).get_segments()
    assert {tuple(map(tuple, line.tolist())) for line in lines} == {((1, 1), (1, 2)), ((0, 1), (1, 1))}
    frame = plots._borders(np.array([[1]]), "white", 1, frame=True).get_segments()
    assert len(frame) == 4
    colours = plots.palette(40)
    assert colours.shape == (40, 3) and len(np.unique(colours.round(3), axis=0)) == 40


def test_the_command(finished, tmp_path, capsys):
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "none.png"]
    for path in paths[:2]:
        path.parent.mkdir()
        quadrants(56).save(path)
    run = ["tokens", *paths, "--run", finished.output(), "--out", tmp_path / "out"]
    assert evlgen(*run, "--before", "--layers", "--words", "--style", "outline") == 1
    words = capsys.readouterr()
    assert f"evlgen tokens: cannot read the image {tmp_path}/none.png: no such file\n" in words.err
    names = {re.sub(r".*/out/", "", line) for line in words.out.splitlines()}
    kinds = {f"{kind}.{end}" for kind in ("tokens", "layers", "layers_before", "words") for end in ("png", "svg")}
    kinds |= {"layers.gif", "layers_before.gif"}
    assert names == {f"x_{n}_{kind}" for n in (1, 2) for kind in kinds}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}


def test_the_command_names_what_it_cannot_draw(finished, drawn_bundle, tmp_path, capsys):
    picture = tmp_path / "x.png"
    quadrants(56).save(picture)
    assert evlgen("tokens", picture, "--run", tmp_path / "no") == 2
    assert "has neither checkpoint_best.pth" in capsys.readouterr().err
    assert evlgen("tokens", picture, "--run", drawn_bundle, "--before", "--out", tmp_path / "out") == 2
    assert "give --run the run folder" in capsys.readouterr().err
    assert evlgen("tokens", picture, "--run", drawn_bundle, "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.fixture
def drawn_bundle(finished, tmp_path):
    assert evlgen("export", finished.output(), tmp_path / "bundle") == 0
    return tmp_path / "bundle"
