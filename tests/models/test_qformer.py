"""BLIP-2's Q-Former as a connector: the same function as LAVIS's and Hugging Face's, and its sources of weights."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertModel, Blip2QFormerConfig, Blip2QFormerModel

from lavis_evlgen.models.connectors.qformer import QFormerConnector, build_qformer, sizes_in
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.weights.sources import WeightsError
from tests.tiny import pictures, tiny_language_model, tiny_vision
from tests.tiny_blip2 import (
    HEADS,
    QUERIES,
    VIT_WIDTH,
    WIDTH,
    bert_folder,
    hugging_face_qformer_name,
    lavis_blip2,
    lavis_blip2_opt,
)


class Vision:
    """What a builder asks of the vision encoder."""

    width, num_tokens, protected = VIT_WIDTH, 17, 1


CONFIG = {"num_layers": 2, "num_query_token": QUERIES, "dropout": 0.1}


@pytest.fixture
def bert(tmp_path):
    return bert_folder(tmp_path / "bert")


@pytest.fixture
def stage1(tmp_path, monkeypatch):
    """(LAVIS's stage-1 model, its checkpoint); heads of width 16 are not bert-base's, so the file says how many."""
    model = lavis_blip2(tmp_path / "stage1", monkeypatch)
    torch.save({"model": model.state_dict() | {"num_attention_heads": torch.tensor(HEADS)}}, tmp_path / "stage1.pth")
    return model, tmp_path / "stage1.pth"


def visual_tokens(batch=3, seed=0):
    return torch.randn(batch, 17, VIT_WIDTH, generator=torch.Generator().manual_seed(seed))


def built(init, **changes) -> QFormerConnector:
    return build_qformer(Vision, {**CONFIG, "connector_init": str(init), **changes}).eval()


@torch.no_grad()
@pytest.mark.parametrize("make", [lavis_blip2, lavis_blip2_opt])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_it_computes_what_lavis_computes(make, ending, tmp_path, monkeypatch):
    """From the checkpoint of either stage: the query path of LAVIS's Blip2Qformer and Blip2OPT, norm included."""
    lavis = make(tmp_path, monkeypatch)
    path = tmp_path / f"blip2.{ending}"
    state = lavis.state_dict() | {"num_attention_heads": torch.tensor(HEADS)}
    state = {name: value.clone() for name, value in state.items()}
    save_file(state, path) if ending == "safetensors" else torch.save({"model": state}, path)
    connector = built(path)
    norm = torch.nn.LayerNorm(VIT_WIDTH)
    norm.load_state_dict(connector.ln_vision_init)
    seen = lavis.visual_encoder(pictures(3))
    expected = lavis.Qformer.bert(
        query_embeds=lavis.query_tokens.expand(3, -1, -1),
        encoder_hidden_states=lavis.ln_vision(seen),
        encoder_attention_mask=torch.ones(3, 17, dtype=torch.long),
        return_dict=True,
    ).last_hidden_state
    tokens = connector(norm(seen)).tokens
    assert tokens.shape == (3, QUERIES, WIDTH)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert (tokens[0] - tokens[1]).abs().max() > 0.1  # it looks


@torch.no_grad()
def test_it_computes_what_hugging_face_computes(bert):
    connector = built(bert)
    config = Blip2QFormerConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=48,
        cross_attention_frequency=2, encoder_hidden_size=VIT_WIDTH,
    )  # fmt: skip
    theirs = Blip2QFormerModel(config).eval()
    ours = {k: v for k, v in connector.state_dict().items() if k != "query_tokens"}
    theirs.load_state_dict({hugging_face_qformer_name(name): value for name, value in ours.items()})
    expected = theirs(
        query_embeds=connector.query_tokens.expand(3, -1, -1), encoder_hidden_states=visual_tokens()
    ).last_hidden_state
    torch.testing.assert_close(connector(visual_tokens()).tokens, expected, rtol=1e-5, atol=1e-5)


def test_a_bert_by_name(bert):
    """Self-attention, norms and MLPs are the BERT's; cross-attention and queries stay random."""
    state = built(bert).state_dict()
    of_bert = BertModel.from_pretrained(bert).state_dict()
    for layer in range(2):
        ours, theirs = f"Qformer.bert.encoder.layer.{layer}.", f"encoder.layer.{layer}."
        for name in ("attention.self.key.weight", "attention.output.LayerNorm.bias", "attention.output.dense.weight"):
            assert torch.equal(state[ours + name], of_bert[theirs + name])
        for part in ("intermediate.dense.weight", "output.dense.weight", "output.LayerNorm.weight"):
            name, _, rest = part.partition(".")
            assert torch.equal(state[f"{ours}{name}_query.{rest}"], of_bert[theirs + part])
    assert torch.equal(state["Qformer.bert.embeddings.LayerNorm.weight"], of_bert["embeddings.LayerNorm.weight"])
    again = built(bert).state_dict()
    drawn = {name for name in state if not torch.equal(state[name], again[name])}
    assert drawn == {"query_tokens"} | {
        f"Qformer.bert.encoder.layer.0.crossattention.{m}.weight"
        for m in ("self.query", "self.key", "self.value", "output.dense")
    }
    assert built(bert).ln_vision_init is None


def test_old_names_of_norms(bert, tmp_path):
    """BERTs of the first years say gamma and beta."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((bert / "config.json").read_text())
    state = BertModel.from_pretrained(bert).state_dict()
    words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, was in words.items():
        state = {name.replace(new, was): value for name, value in state.items()}
    assert any(name.endswith("gamma") for name in state)
    torch.save({f"bert.{name}": value for name, value in state.items()}, old / "pytorch_model.bin")
    name = "Qformer.bert.encoder.layer.1.output_query.LayerNorm.bias"
    assert torch.equal(built(old).state_dict()[name], built(bert).state_dict()[name])


@pytest.mark.parametrize("mode", [True, False])
def test_no_parameter_is_left_without_gradient(bert, mode):
    """DistributedDataParallel waits for ever for a parameter that no backward reaches."""
    connector = built(bert).train(mode)
    connector(visual_tokens()).tokens.square().sum().backward()
    assert [name for name, p in connector.named_parameters() if p.grad is None] == []
    assert {p.requires_grad for p in connector.parameters()} == {True}


def test_random_sizes_are_those_of_bert_base():
    connector = build_qformer(Vision, {"num_layers": 1})
    assert connector.width == 768 and connector.num_output_tokens == 32
    assert connector.query_tokens.std().item() == pytest.approx(0.02, rel=0.05)
    assert connector.Qformer.config.hidden_dropout_prob == 0.1  # BLIP-2's, when the config does not say
    assert build_qformer(Vision, {"num_layers": 1, "dropout": 0.0}).Qformer.config.attention_probs_dropout_prob == 0


def test_the_norm_goes_where_the_second_stage_has_it(stage1):
    lavis, path = stage1
    model = EVLGen(tiny_vision(), built(path), tiny_language_model())
    assert torch.equal(model.ln_vision.weight, lavis.ln_vision.weight)
    assert torch.equal(model.ln_vision.bias, lavis.ln_vision.bias)
    assert model.ln_vision.weight.requires_grad


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"num_layers": 1}, "has Qformer.*layer.1.attention.self.*, which has no place in a Q-Former of 1 layers"),
        ({"num_layers": 3}, "26 of the Q-Former's 71 tensors are not in BLIP-2 checkpoint .*first .*layer.2.*fewer"),
        ({"num_query_token": 4}, r"query_tokens is \(1, 5, 32\) in .*, \(1, 4, 32\) here: model.num_query_token or"),
    ],
)
def test_a_checkpoint_of_other_sizes(stage1, changes, says):
    with pytest.raises(WeightsError, match=says):
        built(stage1[1], **changes)


def test_checkpoints_that_lack_something(stage1, tmp_path, bert):
    state = torch.load(stage1[1], weights_only=True)["model"]
    for lost, says in (
        ("ln_vision.bias", "lacks ln_vision, the norm that its Q-Former was trained behind"),
        ("query_tokens", "1 of the Q-Former's .* tensors are not in .*, first query_tokens"),
        ("Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", "is no checkpoint of LAVIS's blip2 or"),
    ):
        torch.save({"model": {k: v for k, v in state.items() if k != lost}}, tmp_path / "broken.pth")
        with pytest.raises(WeightsError, match=says):
            built(tmp_path / "broken.pth")
    with pytest.raises(WeightsError, match="tensors are not in the BERT weights, first .*layer.2.*model.num_layers"):
        built(bert, num_layers=3)
    with pytest.raises(WeightsError, match="connector_init: absent.pth does not exist"):
        built("absent.pth")


def test_heads_of_lavis_own_checkpoints_are_64_wide(stage1):
    state = torch.load(stage1[1], weights_only=True)["model"]
    assert built(stage1[1]).Qformer.config.num_attention_heads == HEADS
    wide = {"Qformer.bert.encoder.layer.0.intermediate_query.dense.weight": torch.zeros(3072, 768)}
    assert sizes_in(wide, "")["num_attention_heads"] == 12
    assert sizes_in(state, "")["intermediate_size"] == 48
