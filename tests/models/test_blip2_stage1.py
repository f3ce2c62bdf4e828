"""BLIP-2's first stage on our parts: LAVIS's losses and captions, one process or a group, a BERT by name."""

import pytest
import torch
import torch.distributed as dist
from lavis.models.blip2_models import blip2_qformer
from omegaconf import OmegaConf
from transformers import BertModel

from lavis_evlgen.compat import lavis_bridge
from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.blip2_stage1 import LOSSES, Blip2Stage1
from lavis_evlgen.models.vision.encoder import VisionEncoder
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import frozen_names, trainable_state
from tests.run_tools import redraw
from tests.tiny import pictures, tiny_vision
from tests.tiny_blip2 import HEADS, QUERIES, VIT_WIDTH, bert_folder, lavis_blip2

TEXTS = ["a red square", "a dog on the grass", "two cats sleep"]


def samples(batch=3):
    return {"image": pictures(batch), "text_input": TEXTS[:batch]}


@pytest.fixture
def bert(tmp_path):
    return bert_folder(tmp_path / "bert")


def stage1(bert, vision=None, **kwargs) -> Blip2Stage1:
    torch.manual_seed(0)
    return Blip2Stage1(vision or tiny_vision(), str(bert), num_query_token=QUERIES, **kwargs)


@pytest.fixture
def twins(tmp_path, monkeypatch, bert):
    """(LAVIS's Blip2Qformer with the weights of ours, ours with the ViT of LAVIS's), both in evaluation mode."""
    lavis = lavis_blip2(tmp_path, monkeypatch)
    del lavis.visual_encoder.train  # LAVIS's, which returns no module
    ours = redraw(stage1(bert, VisionEncoder(lavis.visual_encoder, VIT_WIDTH, 17, 1, "fp32")))
    left_out = ("num_attention_heads", "Qformer.cls.predictions.bias")  # the bias in use is decoder.bias
    state = {name: value for name, value in trainable_state(ours).items() if name not in left_out}
    differences = lavis.load_state_dict(state, strict=False)
    assert not differences.unexpected_keys
    assert all(name.startswith("visual_encoder.") or name in left_out for name in differences.missing_keys)
    return lavis, ours.eval()


@torch.no_grad()
def test_losses_and_captions_are_lavis_own(twins):
    lavis, ours = twins
    torch.manual_seed(3)
    expected = lavis(samples())
    torch.manual_seed(3)
    found = ours(samples())
    assert set(found) == set(LOSSES)
    for name in LOSSES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    search = {"num_beams": 3, "max_length": 8, "min_length": 3}
    assert ours.generate(samples(), **search) == lavis.generate(samples(), **search)


def test_it_asked_for_a_process_group_before(bert, monkeypatch):
    model = stage1(bert)
    model(samples())
    monkeypatch.setattr(blip2_qformer, "dist", dist)
    with pytest.raises(ValueError, match="process group"):
        model(samples())
    assert "contrast_without_processes" in dict(lavis_bridge.applied())


@torch.no_grad()
def test_a_group_of_one_process_computes_the_same(bert, tmp_path):
    model = stage1(bert).eval()

    def losses():
        torch.manual_seed(3)
        return model(samples())

    before = losses()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        within = losses()
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(before[name], within[name]) for name in LOSSES)


def test_alone_no_rank_talks(bert, monkeypatch):
    """Validation has unlike batches on the ranks; a gather would wait for ever."""
    monkeypatch.setattr("lavis.common.dist_utils.is_dist_avail_and_initialized", lambda: True)
    model = stage1(bert).eval()
    with pytest.raises((ValueError, RuntimeError), match="process group"):
        model(samples())
    assert set(model.validation_losses(samples())) == set(LOSSES)
    with pytest.raises((ValueError, RuntimeError), match="process group"):
        model(samples())


def test_validation_draws_the_same_negatives_and_disturbs_no_generator(bert):
    model = stage1(bert).eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.validation_losses(samples())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert model.validation_losses(samples()) == first
    assert first["loss"] == pytest.approx(sum(first[name] for name in LOSSES[1:]), rel=1e-5)


def test_everything_but_the_vit_learns(bert):
    model = stage1(bert).train()
    model(samples())["loss"].backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None] == []  # DDP would wait for them
    assert not any(name.startswith("visual_encoder.") for name in trainable)
    assert not any(module.training for module in model.visual_encoder.modules())
    saved = trainable_state(model)
    assert not frozen_names(model) & set(saved) and saved["num_attention_heads"] == HEADS
    assert {name.split(".")[0] for name in trainable} == {
        "ln_vision", "Qformer", "query_tokens", "vision_proj", "text_proj", "itm_head", "temp"
    }  # fmt: skip


def test_a_few_steps_learn_which_caption_is_whose(bert):
    model = stage1(bert, dropout=0.0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    before = model.validation_losses(samples())
    for _ in range(20):
        optimizer.zero_grad()
        model(samples())["loss"].backward()
        optimizer.step()
    after = model.eval().validation_losses(samples())
    assert after["loss"] < 0.6 * before["loss"] and after["loss_itc"] < before["loss_itc"]


def test_the_bert_is_where_it_belongs(bert):
    state, of_bert = stage1(bert).Qformer.state_dict(), BertModel.from_pretrained(bert).state_dict()
    for layer in range(2):
        place = f"encoder.layer.{layer}."
        for name in ("attention.self.value.weight", "intermediate.dense.weight", "output.LayerNorm.bias"):
            assert torch.equal(state[f"bert.{place}{name}"], of_bert[place + name])
        for name, part in (("intermediate_query.dense.weight", "intermediate.dense.weight"),
                           ("output_query.dense.bias", "output.dense.bias")):  # fmt: skip
            assert torch.equal(state[f"bert.{place}{name}"], of_bert[place + part])
    words = of_bert["embeddings.word_embeddings.weight"]
    assert torch.equal(state["bert.embeddings.word_embeddings.weight"][: len(words)], words)
    assert len(state["bert.embeddings.word_embeddings.weight"]) == len(words) + 1  # [DEC]
    head = state["cls.predictions.decoder.weight"]
    assert head.data_ptr() == state["bert.embeddings.word_embeddings.weight"].data_ptr()  # tied, as in a BERT


def config(bert, **changes):
    vit = {"image_size": 28, "vit_precision": "fp32", "connector_init": str(bert), "num_query_token": QUERIES}
    return OmegaConf.create(vit | changes)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"freeze_vit": False}, "freeze_vit: False asked; must be true"),
        ({"load_finetuned": True}, "load_finetuned: True asked"),
        ({"connector_init": "random"}, "connector_init: BLIP-2's first stage needs a BERT"),
    ],
)
def test_what_a_config_cannot_ask(bert, changes, says):
    with pytest.raises(ValueError, match=says):
        Blip2Stage1.from_config(config(bert, **changes))


def test_a_config_and_its_checkpoint(bert, parts, tmp_path):
    cfg = config(bert, vit_model=parts["vit_model"])
    trained = Blip2Stage1.from_config(cfg).eval()
    torch.save({"model": trainable_state(trained)}, tmp_path / "stage1.pth")
    again = Blip2Stage1.from_config(OmegaConf.merge(cfg, {"pretrained": str(tmp_path / "stage1.pth")})).eval()
    assert again.validation_losses(samples()) == trained.validation_losses(samples())
    with pytest.raises(WeightsError, match=r"query_tokens is \(1, 5, 32\) there, \(1, 6, 32\) here"):
        Blip2Stage1.from_config(
            OmegaConf.merge(cfg, {"pretrained": str(tmp_path / "stage1.pth"), "num_query_token": 6})
        )


def test_berts_that_lack_something(bert, tmp_path):
    file = bert / "vocab.txt"
    words = file.read_text()
    file.unlink()
    with pytest.raises(WeightsError, match="bert has no vocab.txt, the words of its tokenizer"):
        stage1(bert)
    file.write_text(words)
    text = (bert / "config.json").read_text()
    (bert / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(WeightsError, match="lacks 16 tensors of its BERT, first encoder.layer.2"):
        stage1(bert)
    (bert / "config.json").write_text(text.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(WeightsError, match=r"intermediate.dense.weight is \(48, 32\) in .*bert, and \(40, 32\) by its"):
        stage1(bert)


def test_what_lavis_cannot_search_for(bert):
    with pytest.raises(ConfigError, match="no length_penalty and no repetition_penalty: leave both at 1"):
        stage1(bert).generate(samples(), length_penalty=0.5)


def test_one_picture_has_nothing_to_be_told_from(bert):
    with pytest.raises(ConfigError, match="needs 2 of them: raise run.batch_size_train"):
        stage1(bert)(samples(1))
