"""A language model that learns: adapters and whole models, in float32, in checkpoints, and in peft's own files."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.activation_checkpointing import recompute_llm
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.language.llm_train import Lora, adapter_state, make_trainable, save_adapter, training_of
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.weights.frozen_identity import check_identity, frozen_identity, other_parts
from lavis_evlgen.weights.sources import WeightsError
from lavis_evlgen.weights.trainable import load_trainable, trainable_state
from tests.tiny import pictures, tiny_evlgen, tiny_llama, tiny_opt

LORA = Lora(rank=4, alpha=8)
SAMPLES = {"image": pictures(3), "text_input": ["a red square", "two cats sleep", "dog"]}
KINDS = pytest.mark.parametrize("llm", ["llama", "opt"])
TRAININGS = pytest.mark.parametrize("training", [LORA, "full"], ids=["lora", "full"])


def trained(model, steps=3):
    """The same model after a few optimizer steps, and the losses."""
    optimizer, losses = adamw(model, 1e-2, 0.05, 0.999), []
    for _ in range(steps):
        loss = model(SAMPLES)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@KINDS
@TRAININGS
def test_at_the_start_nothing_has_changed(llm, training):
    plain, learns = tiny_evlgen(llm).eval(), tiny_evlgen(llm, llm_train=training).eval()
    assert torch.equal(plain(SAMPLES)["loss"], learns(SAMPLES)["loss"])


@KINDS
@TRAININGS
def test_all_of_it_learns_and_the_rest_stays(llm, training):
    model = tiny_evlgen(llm, llm_train=training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model, losses = trained(model)
    assert losses[-1] < losses[0]
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {name for name in trains if name.startswith("language_model.")}
    assert inside and (training == "full" or all(".lora_" in name for name in inside))
    own = dict(model.named_parameters())
    still = {name for name in own if torch.equal(own[name], before[name])}
    assert not {name for name in own if name not in trains} - still  # nothing frozen has moved
    # k_proj's bias moves no softmax; positions and tokens that no caption has get no gradient, but decay
    assert not {name for name in inside if name in still and not name.endswith(("k_proj.bias",))}


@TRAININGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_trains_is_float32_and_in_eval_mode(training, dtype):
    model = tiny_evlgen(llm_train=None)
    llm = tiny_llama().to(dtype)
    model = type(model.language_model)(llm, model.language_model.text.tokenizer, llm_train=training).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert not any(module.training for module in model.llm.modules())
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == ({dtype} if training != "full" else set())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        if dtype == torch.float16 and training != "full":
            return  # half precision without autocast is for GPUs
        sums, _ = model.loss(torch.randn(2, 5, 32), ["a dog", "a red square"], ["", ""])
    sums.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@KINDS
@TRAININGS
def test_a_checkpoint_holds_what_trains_once_and_loads(llm, training):
    model, _ = trained(tiny_evlgen(llm, llm_train=training))
    state = {name: value.clone() for name, value in trainable_state(model).items()}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in state if name in dict(model.named_parameters())} == trains
    assert llm != "opt" or "language_model.llm.lm_head.weight" not in state  # tied to the embeddings
    other = tiny_evlgen(llm, llm_train=training, seed=1) if training == "full" else tiny_evlgen(llm, llm_train=training)
    if training == "full":  # the frozen ViT of the same seed
        other.visual_encoder.load_state_dict(model.visual_encoder.state_dict())
    load_trainable(other, state, "there")
    assert torch.equal(model.eval()(SAMPLES)["loss"], other.eval()(SAMPLES)["loss"])
    some = next(name for name in state if name.startswith("language_model."))
    with pytest.raises(WeightsError, match=f"1 trainable tensors are missing, first {some}"):
        load_trainable(other, {name: value for name, value in state.items() if name != some}, "there")


@TRAININGS
def test_weights_of_a_run_with_a_frozen_language_model_are_a_start(training):
    aligned, _ = trained(tiny_evlgen())
    model = tiny_evlgen(llm_train=training)
    load_trainable(model, trainable_state(aligned), "there", model.additions())
    assert torch.equal(aligned.eval()(SAMPLES)["loss"], model.eval()(SAMPLES)["loss"])
    assert not other_parts(frozen_identity(aligned), frozen_identity(model))


@TRAININGS
def test_another_language_model_than_the_frozen_one_is_refused(training):
    """Also where all of it trains now: it starts from its files, which the connector was not aligned with."""
    identity, model = frozen_identity(tiny_evlgen()), tiny_evlgen(llm_train=training)
    check_identity(model, identity, {}, {}, "there")
    next(iter(identity["language_model"]["values"].values()))[0] += 1
    with pytest.raises(WeightsError, match="there was trained with another language_model than the one here"):
        check_identity(model, identity, {}, {}, "there")


@KINDS
def test_peft_loads_our_adapter_and_computes_the_same(llm, tmp_path):
    model, _ = trained(tiny_evlgen(llm, llm_train=LORA))
    save_adapter(model.language_model.llm, tmp_path, "some/model")
    theirs = PeftModel.from_pretrained({"llama": tiny_llama, "opt": tiny_opt}[llm](), tmp_path).eval()
    ids = torch.tensor([[5, 9, 12, 40, 7]])
    expected = model.language_model.llm(input_ids=ids).logits
    plain = {"llama": tiny_llama, "opt": tiny_opt}[llm]()(input_ids=ids).logits
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"


@pytest.fixture
def of_peft(tmp_path):
    """(folder of an adapter that peft wrote, the model it is of)."""
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = get_peft_model(tiny_llama(), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", theirs


def adapted(folder, **kw):
    llm = tiny_llama()
    make_trainable(llm, Lora(**{"rank": 3, "alpha": 5, "targets": ("q_proj", "v_proj"), **kw}), str(folder))
    return llm


def test_an_adapter_of_peft_is_a_start(of_peft):
    folder, theirs = of_peft
    ours = adapted(folder)
    ids = torch.tensor([[5, 9, 12, 40, 7]])
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    state, own = load_file(folder / "adapter_model.safetensors"), adapter_state(ours.state_dict())
    assert set(state) == set(own) and all(torch.equal(state[name], own[name]) for name in state)


def test_an_adapter_of_other_settings_is_refused(of_peft, tmp_path):
    folder, _ = of_peft
    with pytest.raises(WeightsError, match="has rank 3, and model.llm_train.lora.rank is 8"):
        adapted(folder, rank=8)
    with pytest.raises(WeightsError, match="of another language model: 20 tensors differ"):
        adapted(folder, targets="all-linear")
    with pytest.raises(WeightsError, match="adapter_config.json cannot be read as JSON"):
        adapted(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(WeightsError, match="adapter_config.json is no adapter's config: it holds a list"):
        adapted(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(WeightsError, match="use_dora=True, which is not supported"):
        adapted(folder)
    with pytest.raises(ValueError, match="llm_train is not lora; set llm_train=lora"):
        make_trainable(tiny_llama(), "full", str(folder))


def test_what_the_config_may_say():
    assert training_of(None) is training_of({}) is None and training_of("full") == "full"
    assert training_of("lora") == training_of({"lora": None}) == Lora(16, 32, "all-linear")
    assert training_of({"lora": {"rank": 4, "targets": ["v_proj", "q_proj"]}}) == Lora(4, 32, ("q_proj", "v_proj"))
    assert training_of({"lora": {"targets": "q_proj"}}) == Lora(16, 32, ("q_proj",))
    with pytest.raises(ValueError, match="nothing_here.* names no linear layer of LlamaForCausalLM; it has .*q_proj"):
        make_trainable(tiny_llama(), Lora(targets=("nothing_here",)))
    for wrong, words in (("half", "llm_train"), ({"lora": {"rank": 0}}, "rank=0 must be a whole number"),
                         ({"lora": {"ranks": 4}}, "did you mean rank")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            EVLGen.Settings.read({"llm_train": wrong})


@TRAININGS
def test_gradient_checkpointing_changes_no_gradient(training):
    """Also where nothing below the language model trains."""
    grads = []
    for recomputed in (False, True):
        model = tiny_evlgen(llm_train=training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("language_model.") and parameter.requires_grad)
        recompute_llm(model, recomputed)
        model(SAMPLES)["loss"].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and set(grads[0]) == set(grads[1])
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
