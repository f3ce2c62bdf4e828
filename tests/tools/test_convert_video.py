"""Released video checkpoints, by the names of the released implementation: in, used, and back bit for bit."""

import pytest
import torch

from lavis_evlgen.models.evlgen_video import EVLGenVideo
from lavis_evlgen.models.vision.encoder import LAVIS_VITS, build_empty
from lavis_evlgen.tools.convert import from_released
from tests.run_tools import same_tensors
from tests.test_cli import evlgen
from tests.tiny import clips
from tests.tools.test_convert import D_V, checkpoint, folders, save  # noqa: F401  (folders: a fixture)

BLOCKS = 3


def video_checkpoint(projection: str = "opt_proj", gate=(1,)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    state = checkpoint(projection)
    for i in range(BLOCKS):
        name = f"visual_encoder.blocks.{i}.temporal_merge"
        for part in ("key", "query"):
            state[f"{name}.{part}.weight"] = 0.3 * torch.randn(256, D_V, generator=generator)
            state[f"{name}.{part}.bias"] = 0.3 * torch.randn(256, generator=generator)
        state[f"{name}.alpha"] = torch.full(gate, 0.1 * (i + 1))
    return state


def is_trained(name: str) -> bool:
    return ".temporal_merge." in name or not name.startswith(("visual_encoder.", "opt_model.", "llm_model."))


@pytest.mark.parametrize("gate", [(1,), ()])
@pytest.mark.parametrize("projection", ["opt_proj", "llm_proj"])
def test_in_its_modules_are_in_their_blocks_and_back_it_is_bit_equal(projection, gate, folders, tmp_path, capsys):  # noqa: F811
    state = video_checkpoint(projection, gate)
    options = ["--options", *folders[projection]]
    assert evlgen("convert", save(state, tmp_path), tmp_path / "b", *options) == 0
    words = capsys.readouterr().out
    said = "used    visual_encoder.blocks.2.temporal_merge.key.weight  (256, 24) float32 -> visual_encoder.temporal.2.k"
    assert said in words and "left    visual_encoder.*  3 tensors (frozen: not trained)" in words
    model = EVLGenVideo.from_pretrained(str(tmp_path / "b"), num_frames=3)
    for i, mixing in enumerate(model.visual_encoder.temporal):
        name = f"visual_encoder.blocks.{i}.temporal_merge"
        assert torch.equal(mixing.query.weight, state[f"{name}.query.weight"])
        assert torch.equal(mixing.key.bias, state[f"{name}.key.bias"])
        assert mixing.alpha.item() == state[f"{name}.alpha"].item() and mixing.residual == "gated"
    assert torch.equal(model.llm_proj.weight, state[f"{projection}.weight"])
    assert (model.decoding["max_length"], model.decoding["min_length"]) == (20, 5)
    assert model.generate({"image": clips(1)}, num_beams=1, max_length=3)
    assert evlgen("convert", tmp_path / "b", tmp_path / "back.pth", "--to", "released") == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert same_tensors(back, {name: tensor for name, tensor in state.items() if is_trained(name)})


def without_query_of_block_1(state):
    return {k: v for k, v in state.items() if k != "visual_encoder.blocks.1.temporal_merge.query.weight"}


@pytest.mark.parametrize(
    "change, option, says",
    [
        (without_query_of_block_1, None, "1 tensors are missing, first what is here visual_encoder.temporal.1.query"),
        (lambda s: s | {"visual_encoder.blocks.0.temporal_merge.value.weight": torch.ones(2)}, None, "1 tensors are"),
        (lambda s: s | {"visual_encoder.blocks.0.temporal_merge.alpha": torch.ones(2)}, None, "1 tensors have another"),
        (lambda s: s, "model.residual=paper", "3 tensors are unknown: visual_encoder.blocks.0.temporal_merge.alpha"),
        (lambda s: s, "model.temporal=false", "15 tensors are unknown: visual_encoder.blocks.0.temporal_merge.key"),
    ],
)
def test_what_does_not_fit(change, option, says, folders, tmp_path, capsys):  # noqa: F811
    path = save(change(video_checkpoint()), tmp_path)
    options = [*folders["opt_proj"], *([option] if option else [])]
    assert evlgen("convert", path, tmp_path / "out", "--options", *options) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", LAVIS_VITS)
def test_how_many_blocks_the_papers_vits_have(name):
    vit = build_empty(name, 224, 23 if name == "clip_L" else None)
    blocks = vit.blocks if name == "eva_clip_g" else vit.transformer.resblocks
    assert len(blocks) == from_released.BLOCKS[name]
