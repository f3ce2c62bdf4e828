"""EVLGen-Video with files: which weights load, bundles, runs, clips on disk, the types' configs."""

import json
import logging

import cv2
import numpy as np
import pytest
import torch
from lavis.models import load_model_and_preprocess
from omegaconf import OmegaConf

from lavis_evlgen.config.keys import keys_of
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.evlgen_video import EVLGenVideo
from lavis_evlgen.models.vision.temporal import TemporalVision
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import trainable_state
from tests.models.test_evlgen_video import static, tokens
from tests.run_tools import same_tensors
from tests.test_cli import evlgen
from tests.tiny import IMAGE_SIZE, clips, pictures, tiny_evlgen, tiny_evlgen_video, tiny_llama, tiny_tokenizer


def moved(model, seed: int = 5):
    """Its trainable weights are nobody's start any more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(model, folder, **changes):
    torch.save({"model": trainable_state(model) | changes}, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth")


def test_checkpoints_hold_the_temporal_modules_and_load_strictly(tmp_path):
    trained = moved(tiny_evlgen_video(positions=True))
    state = trainable_state(trained)
    temporal = {name for name in state if name.startswith("visual_encoder.")}
    parts = ("query.weight", "query.bias", "key.weight", "key.bias", "alpha", "positions")
    assert temporal == {f"visual_encoder.temporal.{i}.{part}" for i in range(3) for part in parts}
    fresh = tiny_evlgen_video(positions=True)
    fresh.load_checkpoint(save(trained, tmp_path))
    assert same_tensors(trainable_state(fresh), state)
    assert torch.equal(tokens(fresh, clips(2)), tokens(trained, clips(2)))
    del state["visual_encoder.temporal.1.query.bias"]
    torch.save({"model": state}, tmp_path / "less.pth")
    with pytest.raises(WeightsError, match="1 trainable tensors are missing, first visual_encoder.temporal.1.query.b"):
        fresh.load_checkpoint(str(tmp_path / "less.pth"))
    with pytest.raises(WeightsError, match="18 tensors have no place in this model, first visual_encoder.temporal"):
        tiny_evlgen().load_checkpoint(str(tmp_path / "checkpoint.pth"))


def test_an_image_checkpoint_starts_a_video_model(tmp_path, caplog):
    image = moved(tiny_evlgen())
    path = save(image, tmp_path)
    video = tiny_evlgen_video()
    with caplog.at_level(logging.INFO):
        video.load_checkpoint(path)
    numbers = 3 * (2 * (24 * 256 + 256) + 1)
    assert f"{path} has none of 15 tensors ({numbers} numbers) such as visual_encoder.temporal.0.alpha" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(tokens(video, static()), tokens(image, pictures(2)), rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens(video, pictures(2)), tokens(image, pictures(2)))
    baseline = tiny_evlgen_video(temporal=False)
    baseline.load_checkpoint(path)
    assert same_tensors(trainable_state(baseline), trainable_state(image))


def test_positions_can_be_added_to_a_video_checkpoint(tmp_path, caplog):
    trained = moved(tiny_evlgen_video())
    ordered = tiny_evlgen_video(positions=True)
    with caplog.at_level(logging.INFO):
        ordered.load_checkpoint(save(trained, tmp_path))
    assert "has none of 3 tensors (216 numbers) such as visual_encoder.temporal.0.positions" in caplog.text
    with torch.no_grad():
        assert torch.equal(tokens(ordered, clips(2)), tokens(trained, clips(2)))


def section(parts, **changes) -> dict:
    return {
        "arch": "evlgen_video", "model_type": "quickstart", **parts, "image_size": IMAGE_SIZE, "num_layers": 2,
        "vit_precision": "fp32", "llm_precision": "fp32", "tome_r": {"target": 9}, "num_frames": 3,
    } | changes  # fmt: skip


def build(cls, parts, **changes):
    return cls.from_config(OmegaConf.create(section(parts, **changes)))


def test_bundles(parts, tmp_path, caplog):
    trained = moved(build(EVLGenVideo, parts, residual="convex", temporal_positions=True))
    trained.save_pretrained(tmp_path / "video")
    loaded = EVLGenVideo.from_pretrained(str(tmp_path / "video"))
    assert isinstance(loaded.visual_encoder, TemporalVision) and loaded.num_frames == 3
    assert torch.equal(tokens(loaded, clips(2)), tokens(trained, clips(2)))
    with pytest.raises(WeightsError, match="holds a evlgen_video, which EVLGen is not"):
        EVLGen.from_pretrained(str(tmp_path / "video"))

    cfg = {k: v for k, v in section(parts, arch="evlgen").items() if k != "num_frames"}
    image = moved(EVLGen.from_config(OmegaConf.create(cfg)))
    image.save_pretrained(tmp_path / "image")
    with caplog.at_level(logging.INFO):
        video = build(EVLGenVideo, parts, pretrained=str(tmp_path / "image"))
    assert "has none of 15 tensors" in caplog.text
    assert torch.equal(tokens(video, pictures(2)), tokens(image, pictures(2)))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"residual": "soft"}, "residual: 'soft' is not one of gated, convex, paper"),
        ({"frame_pooling": "late"}, "frame_pooling: 'late' is not one of mean, concat, connector_mean"),
        ({"frame_pooling": "temporal_qformer", "soft_prompt": True}, "temporal_qformer has learned queries"),
        ({"vit_layer": 0}, "vit_layer: 0 reads the embeddings"),
        ({"use_grad_checkpoint": True}, "use_grad_checkpoint: True asked"),
    ],
)
def test_settings_that_cannot_be(change, says, parts):
    with torch.device("meta"), pytest.raises(ValueError, match=says):
        build(EVLGenVideo, parts, **change)


def test_pictures_train_and_score_a_video_model(runs):
    """A run on pictures, clips of one frame: task, runner, costs, the shuffled and the blind baseline as they are."""
    runs.config["model"] |= {"arch": "evlgen_video", "num_frames": 2}
    runs.config["run"] |= {"valid_splits": ["val"], "max_iters": 2, "iters_per_inner_epoch": 2}
    runs.train()
    (result,) = (json.loads(path.read_text()) for path in (runs.output() / "result").glob("val_?.json"))
    assert result["loss_gap"] != 0 and result["blind"]["CIDEr"] >= 0 and result["pictures"] == 6
    saved = torch.load(runs.output() / "checkpoint_last.pth", weights_only=True)["model"]
    assert sum(name.startswith("visual_encoder.temporal.") for name in saved) == 15
    assert all(saved[f"visual_encoder.temporal.{i}.alpha"].abs() > 0 for i in range(3))
    row = json.loads((runs.output() / "log.jsonl").read_text().splitlines()[0])
    assert row["flops_per_image"] > 0


def write_clip(path, frames: int = 8):
    """A small clip of changing colours."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 48))
    for i in range(frames):
        writer.write(np.full((48, 64, 3), (30 * i, 255 - 30 * i, 90), np.uint8))
    writer.release()


def test_evlgen_caption_reads_clips_for_a_video_model(parts, tmp_path, capsys):
    processor = {"name": "alpro_video_eval", "image_size": IMAGE_SIZE, "n_frms": 3}
    model = build(EVLGenVideo, parts)
    model.save_pretrained(tmp_path / "b", {"vis_processor": {"train": processor, "eval": processor}}, {"max_length": 4})
    loaded, vis, _ = load_model_and_preprocess("evlgen_video", str(tmp_path / "b"), is_eval=True)
    write_clip(tmp_path / "clip.mp4")
    assert vis["eval"](str(tmp_path / "clip.mp4")).shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    (said,) = loaded.generate({"image": vis["eval"](str(tmp_path / "clip.mp4"))[None]}, max_length=4)
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    files = [str(tmp_path / name) for name in ("clip.mp4", "broken.mp4", "absent.mp4")]
    assert evlgen("caption", *files, "--run", tmp_path / "b") == 1
    out, err = capsys.readouterr()
    assert out == f"{files[0]}\t{' '.join(said.split())}\n"
    lines = err.strip().splitlines()
    assert any(f"{files[1]}: the model captions clips, and as a clip: " in line for line in lines)
    assert lines[-1] == f"evlgen caption: cannot read the image {files[2]}: no such file"


@pytest.mark.parametrize("kind", EVLGenVideo.TYPES)
def test_the_types_differ_from_the_image_models_in_what_is_said(kind):
    """The yaml of each type: the image type's, and the keys of a video model; the processors agree with the model."""
    video, image = (OmegaConf.load(cls.default_config_path(kind)) for cls in (EVLGenVideo, EVLGen))
    changed = {k for k in video.model if video.model[k] != image.model.get(k)}
    own = {"arch", "num_frames", "temporal", "residual", "temporal_positions", "frame_pooling"}
    assert changed == own | ({"lr_scale"} if kind == "quickstart" else {"vit_precision"})
    assert set(image.model) <= set(video.model) <= set(keys_of(EVLGenVideo))
    assert video.model.vit_precision == "fp32" and video.model.residual == "gated" and video.model.temporal
    for stage in video.preprocess.vis_processor.values():
        assert stage.num_frames == video.model.num_frames == 4 and stage.image_size == video.model.image_size


def test_the_papers_model_is_built_without_memory(tmp_path):
    """EVA-g's 39 blocks get 28.1M numbers beside what the image model trains."""
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    cfg = OmegaConf.load(EVLGenVideo.default_config_path("vicuna7b")).model
    cfg |= {"llm_model": str(tmp_path), "connector_init": None}
    with torch.device("meta"):
        model = EVLGenVideo.from_config(cfg)
    assert all(p.is_meta for p in model.parameters())
    assert len(model.visual_encoder.temporal) == 39 and model.connector.num_output_tokens == 29
    trains = sum(p.numel() for n, p in model.named_parameters() if model.part_of(n) == "temporal" and p.requires_grad)
    assert trains == 39 * (2 * (1408 * 256 + 256) + 1) == 28_134_951
