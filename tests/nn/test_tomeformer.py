"""TomeFormer against Hugging Face's BERT (no merging), against plain loops (merging), and its source map."""

import pytest
import torch
from transformers import BertConfig, BertModel

from lavis_evlgen.nn import MergeMap, TomeFormer, TomeFormerConfig
from tests.nn.slow import slow_slot, slow_tomeformer

SIZES = {"hidden_size": 24, "num_layers": 3, "num_heads": 3, "intermediate_size": 40, "max_positions": 40}


def tomeformer(seed=0, dtype=torch.float64, scale=8, **kw):
    """A small TomeFormer with weights large enough that layers, heads and tokens differ."""
    cfg = TomeFormerConfig(**SIZES | {"dropout": 0.0, "num_tokens": 21, "tome_r": 4} | kw)
    torch.manual_seed(seed)
    model = TomeFormer(cfg).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def visual_tokens(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_257_tokens_become_29_at_the_papers_r():
    cfg = TomeFormerConfig(hidden_size=16, num_heads=2, intermediate_size=16)
    assert cfg.schedule == [19] * 12 and cfg.num_output_tokens == 29
    tokens, source = TomeFormer(cfg).eval()(torch.randn(2, 257, 16), return_source=True)
    assert tokens.shape == (2, 29, 16)
    assert source.num_slots == 29 and torch.isfinite(tokens).all()


def bert(layers=3):
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=5, hidden_size=24, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=40, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config).double().eval()


@pytest.mark.parametrize("prefix", ["", "bert."])
@torch.no_grad()
def test_without_merging_it_is_bert(prefix):
    reference = bert()
    model = tomeformer(tome_r=0)
    unused = model.load_bert({prefix + k: v for k, v in reference.state_dict().items()})
    assert {"embeddings.word_embeddings.weight", "pooler.dense.bias"} <= set(unused)
    assert all(k.startswith(("embeddings.word", "embeddings.position_ids", "pooler.")) for k in unused)
    x = visual_tokens(2, 21, 24)
    expected = reference(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_fewer_layers_come_from_the_bottom_of_the_bert():
    reference, model = bert(), tomeformer(tome_r=0, num_layers=2)
    unused = model.load_bert(reference.state_dict())
    x = visual_tokens(2, 21, 24)
    expected = reference(inputs_embeds=x, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-9)
    assert any(k.startswith("encoder.layer.2.") for k in unused)


def test_old_names_of_layer_norm_load_too():
    def old(name):
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return name.replace("LayerNorm.bias", "LayerNorm.beta")

    source, model = tomeformer(0), tomeformer(1)
    assert model.load_bert({old(k): v for k, v in source.state_dict().items()}) == []
    x = visual_tokens(1, 21, 24)
    assert torch.equal(model(x)[0], source(x)[0])


def test_load_bert_names_what_is_missing_or_misshapen():
    with pytest.raises(ValueError, match="lack 16 of.*encoder.layer.2.*num_layers=3"):
        tomeformer().load_bert(bert(layers=2).state_dict())
    with pytest.raises(ValueError, match=r"is \(40, 24\), the TomeFormer needs \(50, 24\)"):
        tomeformer(max_positions=50).load_bert(bert().state_dict())


@pytest.mark.parametrize("protected", [0, 1, 5])
@pytest.mark.parametrize("merge_mean", ["plain", "size"])
@pytest.mark.parametrize("proportional", [False, True])
@torch.no_grad()
def test_with_merging_it_equals_the_loops(protected, merge_mean, proportional):
    model = tomeformer(
        tome_r=[6, 3, 2], protected=protected, merge_mean=merge_mean, proportional_attention=proportional
    )
    x = visual_tokens(2, 21, 24)
    tokens, source = model(x, return_source=True)
    for i in range(2):
        expected, patches = slow_tomeformer(
            model.state_dict(), x[i], 3, [6, 3, 2], protected, merge_mean, proportional
        )
        # sizes are kept in float32, and so are their logarithms
        tolerance = 1e-6 if proportional else 1e-10
        torch.testing.assert_close(tokens[i], expected, rtol=0, atol=tolerance)
        assert source.slot[i].tolist() == slow_slot(patches)


@torch.no_grad()
def test_the_options_change_the_output():
    """Else the test above could pass on options that do nothing."""
    x, kw = visual_tokens(1, 21, 24), {"tome_r": [6, 3, 2]}
    outputs = [
        tomeformer(**kw)(x)[0],
        tomeformer(**kw, merge_mean="size")(x)[0],
        tomeformer(**kw, proportional_attention=True)(x)[0],
        tomeformer(**kw, protected=0)(x)[0],
    ]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_proportional_attention_with_all_sizes_1_is_plain_attention():
    x = visual_tokens(2, 21, 24)
    layer = tomeformer().encoder["layer"][0].attention["self"]
    plain = layer(x, None)
    ones = layer(x, torch.ones(2, 21).log())
    torch.testing.assert_close(ones, plain, rtol=0, atol=1e-12)
    twice = layer(x, torch.tensor([2.0] + [1.0] * 20).log().expand(2, -1))
    # a token of size 2 counts like that token twice
    doubled = layer(torch.cat([x[:, :1], x], 1), None)
    torch.testing.assert_close(twice, doubled[:, 1:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_layer_merges_the_same_pairs_under_autocast():
    """In the type of autocast, half of the pictures would merge other pairs: their cosines differ by less than bf16."""
    x = 1 + 0.1 * visual_tokens(16, 257, 24, dtype=torch.float32)  # alike, as neighbouring patches are
    cfg = {"num_tokens": 257, "max_positions": 257, "num_layers": 1, "tome_r": 60}
    model = tomeformer(dtype=torch.float32, **cfg)
    _, exact = model(x, return_source=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, half = model(x, return_source=True)
    assert torch.equal(exact.slot, half.slot)


@torch.no_grad()
def test_mean_keys_are_the_keys_averaged_over_heads():
    layer, x = tomeformer().encoder["layer"][0].attention["self"], visual_tokens(2, 21, 24)
    torch.testing.assert_close(layer.mean_keys(x), layer.key(x).view(2, 21, 3, 8).mean(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("partition", ["alternate", "random"])
@torch.no_grad()
def test_the_source_map_is_the_composition_of_the_layers(partition):
    model = tomeformer(partition=partition, tome_r=[6, 3, 2], merge_mean="size")
    steps = []
    for layer in model.encoder["layer"]:
        layer.register_forward_hook(lambda module, args, output: steps.append(output[1]))
    _, source = model(visual_tokens(2, 21, 24), return_source=True)
    assert [step.num_slots for step in steps] == [15, 12, 10]
    composed = steps[0].then(steps[1]).then(steps[2])
    assert torch.equal(source.slot, composed.slot) and source.num_slots == 10
    assert source.slot.min() == 0 and source.slot.max() == 9
    assert (source.sizes() >= 1).all() and (source.sizes().sum(1) == 21).all()
    assert ((source.slot == 0).sum(1) == 1).all() and (source.slot[:, 0] == 0).all()  # [CLS], and it alone


@torch.no_grad()
def test_no_source_unless_asked_and_the_same_tokens():
    model, x = tomeformer(), visual_tokens(2, 21, 24)
    tokens, source = model(x)
    assert source is None
    asked, source = model(x, return_source=True)
    assert isinstance(source, MergeMap) and torch.equal(tokens, asked)


@torch.no_grad()
def test_a_picture_is_treated_alike_alone_and_in_a_batch():
    model, x = tomeformer(merge_mean="size", proportional_attention=True), visual_tokens(4, 21, 24)
    batch = model(x)[0]
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1])[0][0], batch[i], rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences():
    cfg = {"hidden_size": 6, "num_heads": 2, "intermediate_size": 5, "num_layers": 2, "max_positions": 9}
    model = tomeformer(**cfg, num_tokens=9, tome_r=2, merge_mean="size", scale=20)
    x = visual_tokens(2, 9, 6).requires_grad_()
    parameters = dict(model.named_parameters())

    def run(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(model, named, (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), eps=1e-6, atol=1e-5, fast_mode=True)
    model(x)[0].square().sum().backward()
    # the metric that chooses the pairs is not differentiated, but keys also attend: everything trains
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # what all keys share changes no attention: no rounding error may stand where the gradient is 0
        assert parameter.grad.any() != name.endswith("key.bias"), name


@torch.no_grad()
def test_random_partition_repeats_in_eval_and_varies_in_training():
    model, x = tomeformer(partition="random"), visual_tokens(1, 21, 24)
    first = model(x)[0]
    torch.rand(7)  # evaluation does not depend on what ran before
    assert torch.equal(model(x)[0], first)
    model.train()
    outputs = [model(x)[0] for _ in range(4)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    torch.manual_seed(5)
    once = model(x)[0]
    torch.manual_seed(5)
    assert torch.equal(model(x)[0], once)


@torch.no_grad()
def test_dropout_acts_in_training_only():
    model, x = tomeformer(dropout=0.5), visual_tokens(1, 21, 24)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize(
    "kw, message",
    [
        ({"num_heads": 5}, "24 is not divisible by num_heads 5"),
        ({"num_tokens": 41}, "41 visual tokens.*40 position"),
        ({"merge_mean": "median"}, "'median' is not one of plain, size"),
        ({"partition": "halves"}, "'halves' is not one of alternate, random"),
    ],
)
def test_bad_configurations(kw, message):
    with pytest.raises(ValueError, match=message):
        tomeformer(**kw)
