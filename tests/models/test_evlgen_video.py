"""EVLGen-Video on tiny parts: what it is on static clips, what order does, the baselines, and which weights load."""

import pytest
import torch

from lavis_evlgen.datasets.facts import DatasetFacts
from lavis_evlgen.models.evlgen_video import POOLINGS, EVLGenVideo, averaged, concatenated
from lavis_evlgen.models.vision.encoder import VisionEncoder
from lavis_evlgen.runners.optim import parameter_groups
from lavis_evlgen.runners.progress import startup_table
from lavis_evlgen.tasks.blind_baseline import assign
from lavis_evlgen.tasks.captioning import EvlgenCaptionTask
from tests.tiny import (
    clips,
    pictures,
    tiny_clip,
    tiny_evlgen,
    tiny_evlgen_video,
    tiny_lavis_clip,
    tiny_lavis_vision,
    tiny_siglip,
    tiny_vision,
)

T = 3
ORDER = [2, 0, 1]
VITS = {
    "dinov2": tiny_vision, "clip": lambda: tiny_vision(tiny_clip), "siglip": lambda: tiny_vision(tiny_siglip),
    "eva_clip_g": tiny_lavis_vision, "clip_L": lambda: tiny_lavis_vision(tiny_lavis_clip),
}  # fmt: skip


def static(batch: int = 2) -> torch.Tensor:
    return pictures(batch)[:, :, None].expand(-1, -1, T, -1, -1)


def tokens(model, image) -> torch.Tensor:
    return model.eval().visual_prompt(image).tokens


@pytest.mark.parametrize("vit", VITS)
@torch.no_grad()
def test_closed_gates_are_the_image_model(vit):
    """Frame by frame bit for bit; a picture, and a clip that stands still, too."""
    video, image = tiny_evlgen_video(VITS[vit]()), tiny_evlgen(vision=VITS[vit]())
    flat = clips(2).transpose(1, 2).flatten(0, 1)
    assert torch.equal(video.frame_tokens(clips(2)).flatten(0, 1), image.visual_encoder(flat))
    expected = tokens(image, pictures(2))
    assert torch.equal(tokens(video, pictures(2)), expected)
    assert torch.equal(tokens(video, pictures(2)[:, :, None]), expected)
    torch.testing.assert_close(tokens(video, static()), expected, rtol=1e-4, atol=1e-4)  # a mean of three equals
    assert (tokens(video, clips(2)) - expected).abs().max() > 0.01


@pytest.mark.parametrize("positions", [False, True])
@torch.no_grad()
def test_convex_is_the_image_model_on_static_clips_whatever_it_has_learned(positions):
    image = tiny_evlgen()
    convex = tiny_evlgen_video(residual="convex", alpha=0.8, positions=positions)
    torch.testing.assert_close(convex.frame_tokens(static())[:, 0], image.visual_encoder(pictures(2)))
    torch.testing.assert_close(tokens(convex, static()), tokens(image, pictures(2)), rtol=1e-4, atol=1e-4)
    for residual in ("gated", "paper"):
        other = tiny_evlgen_video(residual=residual, alpha=0.8)
        assert (other.frame_tokens(static())[:, 0] - image.visual_encoder(pictures(2))).abs().max() > 0.1


@torch.no_grad()
def test_only_positions_tell_the_order_of_frames():
    plain, ordered = tiny_evlgen_video(alpha=0.8), tiny_evlgen_video(alpha=0.8, positions=True)
    shuffled = clips(2)[:, :, ORDER]
    torch.testing.assert_close(tokens(plain, shuffled), tokens(plain, clips(2)), rtol=1e-3, atol=1e-3)
    assert (tokens(ordered, shuffled) - tokens(ordered, clips(2))).abs().max() > 0.05


@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_learns(vit, pooling):
    model = tiny_evlgen_video(VITS[vit](), alpha=0.5, positions=True, frame_pooling=pooling)
    model({"image": clips(2), "text_input": ["a dog", "two cats sleep"]})["loss"].backward()
    parts = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.add(model.part_of(name))
            if "token_type" not in name and not name.endswith("key.bias"):  # their gradients are 0
                assert parameter.grad.abs().sum() > 0, name
        else:
            assert name.startswith(("visual_encoder.vit.", "language_model.")) and parameter.grad is None, name
    assert parts == set(EVLGenVideo.PARTS) - {"gates", "soft_prompt", "language_model"}


@pytest.mark.parametrize("vit", VITS)
def test_without_temporal_modules_the_vit_leaves_no_graph(vit):
    model = tiny_evlgen_video(VITS[vit](), temporal=False)
    assert type(model.visual_encoder) is VisionEncoder and not any("temporal" in n for n, _ in model.named_parameters())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        assert not model.frame_tokens(clips(2)).requires_grad and not saved
        mixed = tiny_evlgen_video(VITS[vit]())
        assert mixed.frame_tokens(clips(2)).requires_grad and saved


@torch.no_grad()
def test_the_baselines_are_sums_over_the_image_model():
    image = tiny_evlgen().eval()
    alone = torch.stack([tokens(image, clips(2)[:, :, t]) for t in range(T)], 1)  # (B, T, L', D)
    concat = tiny_evlgen_video(temporal=False, frame_pooling="concat")
    torch.testing.assert_close(tokens(concat, clips(2)), alone.flatten(1, 2), rtol=1e-4, atol=1e-4)
    late = tiny_evlgen_video(temporal=False, frame_pooling="connector_mean")
    torch.testing.assert_close(tokens(late, clips(2)), alone.mean(1), rtol=1e-4, atol=1e-4)
    features = torch.stack([image.visual_encoder(clips(2)[:, :, t]) for t in range(T)]).mean(0)
    expected = image.llm_proj(image.connector(image.ln_vision(features)).tokens)
    early = tiny_evlgen_video(temporal=False)
    torch.testing.assert_close(tokens(early, clips(2)), expected, rtol=1e-4, atol=1e-4)
    for model in (concat, late, early):  # of one frame they are all the image model
        assert torch.equal(tokens(model, pictures(2)), tokens(image, pictures(2)))
    assert concat.token_counts() == "3 frames of 17 visual -> 27 in the prompt (frame_pooling concat)"
    assert early.token_counts() == "3 frames of 17 visual -> 9 in the prompt (frame_pooling mean)"


@torch.no_grad()
def test_source_and_mask_of_concatenated_frames():
    model = tiny_evlgen_video(temporal=False, frame_pooling="concat").eval()
    prompt = model.connect(clips(2), return_source=True)
    image = tiny_evlgen().eval()
    assert prompt.source.num_slots == 27 == prompt.tokens.shape[1] and prompt.source.slot.shape == (2, 17 * T)
    for t in range(T):
        one = image.connect(clips(2)[:, :, t], return_source=True).source
        assert torch.equal(prompt.source.slot[:, 17 * t : 17 * (t + 1)], one.slot + 9 * t)
    late = tiny_evlgen_video(temporal=False, frame_pooling="connector_mean").eval()
    with pytest.raises(ValueError, match="stands for other patches in each frame: no source"):
        late.connect(clips(1), return_source=True)
    prompt = tiny_evlgen().connect(pictures(2 * T))
    prompt.mask = torch.arange(2 * T * 9).view(2 * T, 9) % 2
    assert torch.equal(concatenated(prompt, T).mask, prompt.mask.reshape(2, T * 9))
    with pytest.raises(ValueError, match="connector_mean needs prompts of one length; take mean or concat"):
        averaged(prompt, T)


class ThreeClips(DatasetFacts):
    references, annotation = {}, [{"image_id": name} for name in "abc"]

    def __init__(self, texts):
        self.texts = texts

    def source_of(self, row):
        return row["image_id"]

    def texts_of(self, rows):
        return {"text_input": [self.texts[row] for row in rows]}


def test_captions_features_and_the_task_take_clips():
    model = tiny_evlgen_video(alpha=0.5).eval()
    captions = model.generate({"image": clips(2)}, num_beams=2, max_length=5)
    assert len(captions) == 2 and all(isinstance(text, str) for text in captions)
    features = model.extract_features({"image": clips(2)})
    assert features.image_embeds.shape == (2, 9, 16) and features.image_embeds_proj.shape == (2, 9, 32)
    task = EvlgenCaptionTask({"num_beams": 1, "max_length": 4}, metrics=["CIDEr"], tokenizer="simple")
    batch = {"image": clips(3), "text_input": ["a dog", "a red square", "two cats"], "image_id": ["a", "b", "c"],
             "instance_id": ["0", "1", "2"], "bad": []}  # fmt: skip
    task.before_evaluation(model, ThreeClips(batch["text_input"]))
    rows = task.evaluation(model, [batch])
    assign(rows)
    prompt = model.visual_prompt(clips(3))
    donor = {text: picture for picture, text in enumerate(task.blind.partner)}
    others = type(prompt)(prompt.tokens[[donor[text] for text in range(3)]])
    shuffled = model.loss_of(others, batch)[0].tolist()
    assert [row["image_id"] for row in rows] == ["a", "b", "c"]
    assert [row["loss_shuffled"] for row in rows] == pytest.approx(shuffled, rel=1e-4)
    assert all(row["loss"] != row["loss_shuffled"] for row in rows)


def test_shapes_that_are_no_clips():
    model = tiny_evlgen_video()
    with pytest.raises(ValueError, match=r"of shape \(2, 4, 3, 28, 28\); clips are \(B, 3, T, H, W\), colours before"):
        model.visual_prompt(clips(2, 4).transpose(1, 2))
    with pytest.raises(ValueError, match="clips of 4 frames, but model.num_frames is 3: set it, or the num"):
        model.visual_prompt(clips(2, 4))
    with pytest.raises(ValueError, match="frame_pooling: 'max' is not one of mean, concat, connector_mean"):
        tiny_evlgen_video(frame_pooling="max")


def test_parts_rates_and_the_start_up_table():
    model = tiny_evlgen_video(positions=True, lr_scale={"temporal": 0.25})
    groups = {group["name"]: group for group in parameter_groups(model, 0.05)}
    assert groups["temporal"]["lr_scale"] == groups["temporal (no decay)"]["lr_scale"] == 0.25
    numbers = sum(p.numel() for key in ("temporal", "temporal (no decay)") for p in groups[key]["params"])
    assert numbers == 3 * (2 * (24 * 256 + 256) + 1 + T * 24)
    table = startup_table(model, {"tokens": model.token_counts()})
    row = next(line for line in table.splitlines() if line.strip().startswith("│ temporal"))
    assert "0.04M" in row and "0.25" in row and "3 frames of 17 visual -> 9" in table
