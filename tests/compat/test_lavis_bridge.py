"""Each bridge is needed where it is applied, and does what it says.

What happens at import needs an interpreter that has not imported LAVIS yet, hence the subprocess.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps

from lavis_evlgen.compat import lavis_bridge, transformers5
from lavis_evlgen.compat.environment import release

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMERS = release(transformers.__version__)
WITHOUT_BRIDGES = """
import sys, types
package = types.ModuleType("lavis_evlgen")  # in place of the package, whose __init__ would have `import lavis` bridged
package.__path__ = ["lavis_evlgen"]
sys.modules["lavis_evlgen"] = package
from lavis_evlgen.compat import lavis_bridge

try:
    with lavis_bridge.without_heavy_imports():
        import lavis
    print("imported")
except ImportError as error:
    print(error)
for name in [name for name in sys.modules if name.partition(".")[0] == "lavis"]:
    del sys.modules[name]

lavis_bridge.before_import()
with lavis_bridge.without_heavy_imports():
    import lavis
from lavis.common.registry import registry
from lavis.models.blip2_models.Qformer import BertLMHeadModel

def state():
    return (hasattr(BertLMHeadModel, "generate"),
            "runner_iter" in registry.mapping["runner_name_mapping"],
            "linear_warmup_cosine_lr" in registry.mapping["lr_scheduler_name_mapping"],
            registry.get_path("cache_root"))

print(*state())
lavis_bridge.after_import()
print(*state())
print(*[name for name, _ in lavis_bridge.applied()])
"""


@pytest.fixture(scope="module")
def without_bridges() -> list[str]:
    """What WITHOUT_BRIDGES prints: how `import lavis` went, the state before and after bridges, and their names."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_BRIDGES],
        cwd=ROOT,
        env={**os.environ, "LAVIS_CACHE": "/some/cache"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-4:]


def test_import_lavis_fails_without_the_bridge_from_transformers_4_56(without_bridges):
    if TRANSFORMERS >= (4, 56):
        assert "apply_chunking_to_forward" in without_bridges[0]
    else:
        assert without_bridges[0] == "imported"


def test_generate_runners_and_cache_root_are_missing_without_bridges(without_bridges):
    """One interpreter, before and after: what is recorded is exactly what was missing."""
    before, after, applied = map(str.split, without_bridges[1:])
    assert before[1:3] == ["False", "False"] and before[3] != "/some/cache"
    assert after == ["True", "True", "True", "/some/cache"]
    assert {"register:lavis.runners", "register:lavis.common.optims", "set_cache_root"} <= set(applied)
    assert ("restore_generate:BertLMHeadModel" in applied) == (before[0] == "False")
    assert ("reexport_pruning_helpers" in applied) == (TRANSFORMERS >= (4, 56))
    if TRANSFORMERS >= (4, 52):
        assert before[0] == "False"


@pytest.fixture
def slow_package(tmp_path, monkeypatch):
    """A package that `without_heavy_imports` is about, not imported yet."""
    (tmp_path / "slow_package").mkdir()
    (tmp_path / "slow_package" / "__init__.py").write_text("value = 1")
    (tmp_path / "slow_package" / "part.py").write_text("value = 2")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lavis_bridge, "HEAVY", ("slow_package", "not_installed"))
    yield
    for name in ("slow_package", "slow_package.part"):
        sys.modules.pop(name, None)


def test_a_heavy_import_waits_for_its_first_use(slow_package):
    with lavis_bridge.without_heavy_imports():
        later = importlib.import_module("slow_package")
        assert importlib.util.find_spec("slow_package").origin.endswith("__init__.py")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("not_installed")
    assert "slow_package" not in sys.modules
    assert later.value == 1 and "slow_package" in sys.modules
    assert not hasattr(later, "no_such_value")


def test_within_it_the_rest_of_a_package_can_be_imported(slow_package):
    with lavis_bridge.without_heavy_imports():
        later = importlib.import_module("slow_package")
        assert importlib.import_module("slow_package.part").value == 2
    assert later.part is sys.modules["slow_package"].part


def test_bridges_are_applied_once_and_say_why():
    importlib.import_module("lavis")
    before = lavis_bridge.applied()
    lavis_bridge.before_import()
    lavis_bridge.after_import()
    assert lavis_bridge.applied() == before
    names = [name for name, _ in before]
    assert len(set(names)) == len(names) and all(reason for _, reason in before)
    lavis_bridge.applied().clear()
    assert lavis_bridge.applied() == before, "applied() hands out a copy"


@pytest.mark.parametrize("module_name, class_name", lavis_bridge.GENERATING)
def test_lavis_classes_can_generate_and_keep_their_own_methods(module_name, class_name):
    model_class = getattr(importlib.import_module(module_name), class_name)
    assert issubclass(model_class, transformers.GenerationMixin) and model_class.can_generate()
    assert "prepare_inputs_for_generation" in vars(model_class)
    order = model_class.__mro__
    assert order.index(transformers.PreTrainedModel) < order.index(transformers.GenerationMixin)


def test_a_tiny_lavis_opt_generates_from_embeddings():
    """The two BLIP-2 paths that the bridge is for: stage 2 hands the language model embeddings."""
    from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, bos_token_id=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    query = torch.randn(2, 3, 16)  # (B, L', D_lm)
    prompt = torch.tensor([[2, 5], [2, 7]])
    with torch.no_grad():
        tokens = model.generate(
            prompt,
            query_embeds=query,
            attention_mask=torch.ones(2, 5, dtype=torch.long),
            max_new_tokens=4,
            do_sample=False,
        )
    assert tokens.shape[0] == 2 and torch.equal(tokens[:, :2], prompt) and tokens.shape[1] > 2


def test_refresh_model_zoo_lists_a_model_registered_late(monkeypatch):
    from lavis.common.registry import registry
    from lavis.models import model_zoo

    class Late:
        PRETRAINED_MODEL_CONFIG_DICT = {"tiny": "nowhere.yaml"}

    with monkeypatch.context() as patch:
        patch.setitem(registry.mapping["model_name_mapping"], "late_model", Late)
        assert "late_model" not in dict(model_zoo)
        lavis_bridge.refresh_model_zoo()
        assert dict(model_zoo)["late_model"] == ["tiny"] and "late_model" in str(model_zoo)
    lavis_bridge.refresh_model_zoo()
    assert "late_model" not in dict(model_zoo)


def test_autocontrast_does_not_make_pictures_white():
    from lavis.processors import randaugment

    pixels = np.random.RandomState(0).randint(40, 200, (9, 7, 3), dtype=np.uint8)
    expected = np.asarray(ImageOps.autocontrast(Image.fromarray(pixels)))
    with np.errstate(over="ignore"):
        assert randaugment.autocontrast_func(pixels).min() == 255  # LAVIS's own
    assert expected.min() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(randaugment.func_dict["AutoContrast"](pixels), expected)
        augment = randaugment.RandomAugment(1, 5, isPIL=True, augs=["AutoContrast"])
        found = {augment(Image.fromarray(pixels)).tobytes() for _ in range(20)}
    assert found == {pixels.tobytes(), expected.tobytes()}  # applied half of the time
    assert "stretch_contrast" in dict(lavis_bridge.applied())


# --- what transformers 5 dropped (compat/transformers5.py)

OF_TRANSFORMERS_5 = {"find_pruneable_heads_and_indices", "supply_model_parallel_utils", "supply_model_methods",
                     "keep_mask_of_queries"}  # fmt: skip


def test_what_transformers_5_dropped_is_supplied_there_alone():
    importlib.import_module("lavis")
    names = {name for name, _ in lavis_bridge.applied()}
    assert names & OF_TRANSFORMERS_5 == (OF_TRANSFORMERS_5 if TRANSFORMERS >= (5,) else set())


def test_pruneable_heads_are_those_of_transformers_4():
    found = transformers5.find_pruneable_heads_and_indices
    heads, rows = found([1, 3], 3, 2, {0, 3})  # of four heads, 0 and 3 are gone: 1 is the first that is left
    assert heads == {1} and rows.tolist() == [2, 3, 4, 5]
    if TRANSFORMERS < (5,):
        theirs = transformers.pytorch_utils.find_pruneable_heads_and_indices
        for arguments in ([0], 4, 3, set()), ([2, 4], 4, 3, {0}), ([1], 3, 2, {1}):
            assert found(*arguments)[0] == theirs(*arguments)[0]
            assert found(*arguments)[1].tolist() == theirs(*arguments)[1].tolist()


def test_device_maps_share_the_layers_out():
    assert transformers5.get_device_map(5, [0, 1]) == {0: [0, 1, 2], 1: [3, 4]}
    transformers5.assert_device_map({0: [0, 2], 1: [1]}, 3)
    for wrong in ({0: [0, 1]}, {0: [0, 1], 1: [1, 2]}, {0: [0, 1, 2, 3]}):
        with pytest.raises(ValueError, match="each of 0 to 2 has to be there once"):
            transformers5.assert_device_map(wrong, 3)


def test_masks_are_those_of_transformers_4():
    model = torch.nn.Linear(1, 1)
    model.dtype = torch.float32
    least = torch.finfo(torch.float32).min
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])  # (B, L)
    inverted = transformers5.invert_attention_mask(model, mask)
    assert torch.equal(inverted, torch.tensor([[0, 0, least], [0, least, least]])[:, None, None])
    square = transformers5.invert_attention_mask(model, mask[:, None].expand(-1, 2, -1))  # (B, T, L)
    assert torch.equal(square, inverted.expand(-1, -1, 2, -1))
    assert transformers5.get_head_mask(model, None, 2) == [None, None]
    heads = transformers5.get_head_mask(model, torch.tensor([1, 0, 1]), 2)
    assert heads.shape == (2, 1, 3, 1, 1) and heads.flatten().tolist() == [1, 0, 1, 1, 0, 1]
    if TRANSFORMERS < (5,):
        theirs = transformers.PreTrainedModel
        assert torch.equal(inverted, theirs.invert_attention_mask(model, mask))


def test_a_loaded_lavis_bert_has_its_positions_and_its_ties(tmp_path):
    """transformers 5 loads it in two: one bias by two names, and positions that are in no file."""
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8, "max_position_embeddings": 6}  # fmt: skip
    queries = {"encoder_width": 8, "add_cross_attention": True, "cross_attention_freq": 2, "query_length": 2}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    config = BertConfig(**sizes, **queries)
    model = BertLMHeadModel.from_pretrained(tmp_path, config=config)
    head = model.cls.predictions
    assert model.bert.embeddings.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert head.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not head.decoder.bias.any()
    # up to transformers 4 they are two in a loaded model, of which `predictions.bias` is neither read nor set
    assert TRANSFORMERS < (5,) or head.decoder.bias is head.bias


def test_a_function_that_is_imported_by_name_waits_for_its_first_call(slow_package, tmp_path, monkeypatch):
    monkeypatch.setattr(lavis_bridge, "BY_NAME", {"slow_package": ("used",)})
    (tmp_path / "slow_package" / "__init__.py").write_text("used = lambda x: 2 * x\n")
    with lavis_bridge.without_heavy_imports():
        namespace = {}
        exec("from slow_package import used", namespace)
    assert "slow_package" not in sys.modules
    assert namespace["used"](21) == 42 and "slow_package" in sys.modules
