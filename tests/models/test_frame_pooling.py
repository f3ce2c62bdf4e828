"""Frame poolings that train: what they see, what they compute by another path, what order does, which weights load."""

import logging

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.models.connectors.frame_pooling import POOLINGS, TemporalQFormer
from lavis_evlgen.models.evlgen_video import EVLGenVideo
from lavis_evlgen.weights.sources import WeightsError
from tests.models.test_evlgen_video import ORDER, T, tokens
from tests.models.test_evlgen_video_files import build, moved, save
from tests.run_tools import redraw, same_tensors
from tests.tiny import clips, pictures, tiny_connector, tiny_evlgen, tiny_evlgen_video, tiny_vision
from tests.tiny_blip2 import hugging_face_qformer_name

TOKENS = {"temporal_qformer": 32, "temporal_queries": 9 + 64}  # of the prompt


def pooled(pooling: str, **kw) -> EVLGenVideo:
    """Its pooling's weights are large enough that frames differ."""
    model = tiny_evlgen_video(frame_pooling=pooling, **kw)
    redraw(model.frame_pool)
    return model.eval()


def hugging_face(q_former, states: torch.Tensor) -> torch.Tensor:
    """The same Q-Former, of layers that all cross-attend, computed by Hugging Face's BLIP-2."""
    config = Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, cross_attention_frequency=1,
        encoder_hidden_size=states.shape[-1],
    )  # fmt: skip
    theirs = Blip2QFormerModel(config).eval()
    ours = {k: v for k, v in q_former.state_dict().items() if k != "query_tokens"}
    theirs.load_state_dict({hugging_face_qformer_name(name): value for name, value in ours.items()})
    queries = q_former.query_tokens.expand(len(states), -1, -1)
    return theirs(query_embeds=queries, encoder_hidden_states=states).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("pooling", TOKENS)
def test_shapes_of_clips_and_pictures(pooling):
    model, count = pooled(pooling), TOKENS[pooling]
    for image in (clips(2), pictures(2), pictures(2)[:, :, None]):
        prompt = model.connect(image, return_source=True)
        assert prompt.tokens.shape == (2, count, 16) and prompt.source is None and prompt.mask is None
    assert model.token_counts() == f"3 frames of 17 visual -> {count} in the prompt (frame_pooling {pooling})"
    assert len(model.generate({"image": clips(2)}, num_beams=2, max_length=4)) == 2


@torch.no_grad()
def test_the_temporal_qformer_reads_the_connectors_tokens_and_their_frames():
    model, image = pooled("temporal_qformer", temporal=False), tiny_evlgen().eval()
    frames = [image.connect(clips(2)[:, :, t]).tokens + model.frame_pool.positions.weight[t] for t in range(T)]
    expected = hugging_face(model.frame_pool.q_former, torch.cat(frames, 1))
    torch.testing.assert_close(model.connect(clips(2)).tokens, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_temporal_queries_read_all_frames_behind_the_image_models_prompt():
    model, image = pooled("temporal_queries", temporal=False), tiny_evlgen().eval()
    features = torch.stack([image.visual_encoder(clips(2)[:, :, t]) for t in range(T)], 1)  # (B, T, L, D_v)
    found = model.connect(clips(2)).tokens
    spatial = image.connector(image.ln_vision(features.mean(1))).tokens
    torch.testing.assert_close(found[:, :9], spatial, rtol=1e-4, atol=1e-4)
    expected = hugging_face(model.frame_pool.q_former, image.ln_vision(features).flatten(1, 2))
    torch.testing.assert_close(found[:, 9:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_which_of_them_knows_the_order_of_frames():
    shuffled = clips(2)[:, :, ORDER]
    for temporal in (True, False):
        model = pooled("temporal_qformer", temporal=temporal)
        assert (tokens(model, shuffled) - tokens(model, clips(2))).abs().max() > 0.05
        model.frame_pool.positions.weight.zero_()
        torch.testing.assert_close(tokens(model, shuffled), tokens(model, clips(2)), rtol=1e-3, atol=1e-3)
    plain = pooled("temporal_queries", alpha=0.8)
    torch.testing.assert_close(tokens(plain, shuffled), tokens(plain, clips(2)), rtol=1e-3, atol=1e-3)
    ordered = pooled("temporal_queries", alpha=0.8, positions=True)
    assert (tokens(ordered, shuffled) - tokens(ordered, clips(2)))[:, 9:].abs().max() > 0.05


@pytest.mark.parametrize("pooling", TOKENS)
def test_checkpoints_load_strictly(pooling, tmp_path, caplog):
    trained = moved(tiny_evlgen_video(frame_pooling=pooling))
    path = save(trained, tmp_path)
    fresh = tiny_evlgen_video(frame_pooling=pooling, seed=1)
    fresh.load_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(tokens(fresh, clips(2)), tokens(trained, clips(2)))
    with pytest.raises(WeightsError, match="tensors have no place in this model, first frame_pool"):
        tiny_evlgen_video().load_checkpoint(path)
    content = torch.load(path, weights_only=True)
    del content["model"]["frame_pool.q_former.query_tokens"]
    torch.save(content, tmp_path / "less.pth")
    with pytest.raises(WeightsError, match="1 trainable tensors are missing, first frame_pool.q_former.query_tokens"):
        fresh.load_checkpoint(str(tmp_path / "less.pth"))
    # an image model starts it, and what it has not stays as built
    built = {name: value.clone() for name, value in fresh.frame_pool.state_dict().items()}
    with caplog.at_level(logging.INFO):
        fresh.load_checkpoint(save(moved(tiny_evlgen()), tmp_path))
    assert "such as frame_pool." in caplog.text and same_tensors(fresh.frame_pool.state_dict(), built)


@pytest.mark.parametrize("pooling", TOKENS)
def test_config_and_bundle(pooling, parts, tmp_path):
    model = moved(build(EVLGenVideo, parts, frame_pooling=pooling, dropout=0.3))
    config = model.frame_pool.q_former.Qformer.config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.3)
    assert (config.num_attention_heads, config.intermediate_size, config.num_hidden_layers) == (2, 32, 2)
    assert {model.part_of(name) for name, _ in model.named_parameters() if "frame_pool" in name} == {"temporal"}
    model.save_pretrained(tmp_path / "bundle")
    loaded = EVLGenVideo.from_pretrained(str(tmp_path / "bundle"))
    with torch.no_grad():
        assert torch.equal(tokens(loaded, clips(2)), tokens(model, clips(2)))


@pytest.mark.parametrize("pooling", [*TOKENS, "connector_mean"])
def test_prompts_of_different_length_are_refused(pooling):
    model = tiny_evlgen_video(frame_pooling=pooling).eval()
    whole = model.connector.forward
    model.connector.forward = lambda *args, **keys: VisualPrompt(
        (found := whole(*args, **keys).tokens), torch.ones(found.shape[:2])
    )
    with pytest.raises(ValueError, match=f"frame_pooling: {pooling} needs prompts of one length; take mean or concat"):
        model.connect(clips(2))


def test_every_pooling_is_described_and_dropout_left_out_is_berts():
    assert set(POOLINGS) == {"mean", "concat", "connector_mean", *TOKENS}
    config = TemporalQFormer(tiny_connector(tiny_vision()), T).q_former.Qformer.config
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.1
