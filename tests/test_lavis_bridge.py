"""Each bridge is needed where it is applied, and does what it says.

What happens at import needs an interpreter that has not imported LAVIS yet, hence the subprocesses.
"""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps

from lavis_evlgen.compat import lavis_bridge
from lavis_evlgen.compat.environment import release

ROOT = Path(__file__).resolve().parent.parent
TRANSFORMERS = release(transformers.__version__)
# the folder on the path stands for the package, whose __init__ would have `import lavis` bridged
WITHOUT_BRIDGES = (
    "import sys, types\n"
    "package = types.ModuleType('lavis_evlgen'); package.__path__ = ['lavis_evlgen']\n"
    "sys.modules['lavis_evlgen'] = package\n"
    "from lavis_evlgen.compat import lavis_bridge\n"
)


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_import_lavis_fails_without_the_bridge_from_transformers_4_56():
    done = run_python("import lavis")
    if TRANSFORMERS >= (4, 56):
        assert done.returncode != 0 and "apply_chunking_to_forward" in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_generate_runners_and_cache_root_are_missing_without_bridges():
    """One interpreter, before and after: what is recorded is exactly what was missing."""
    done = run_python(
        WITHOUT_BRIDGES
        + "lavis_bridge.before_import()\n"
        "import lavis\n"
        "from lavis.common.registry import registry\n"
        "from lavis.models.blip2_models.Qformer import BertLMHeadModel\n"
        "def state():\n"
        "    return (hasattr(BertLMHeadModel, 'generate'),\n"
        "            'runner_iter' in registry.mapping['runner_name_mapping'],\n"
        "            'linear_warmup_cosine_lr' in registry.mapping['lr_scheduler_name_mapping'],\n"
        "            registry.get_path('cache_root'))\n"
        "print(*state())\n"
        "lavis_bridge.after_import()\n"
        "print(*state())\n"
        "print(*[name for name, _ in lavis_bridge.applied()])\n",
        LAVIS_CACHE="/some/cache",
    )
    assert done.returncode == 0, done.stderr
    before, after, applied = (line.split() for line in done.stdout.splitlines()[-3:])
    assert before[1:3] == ["False", "False"] and before[3] != "/some/cache"
    assert after == ["True", "True", "True", "/some/cache"]
    assert {"register:lavis.runners", "register:lavis.common.optims", "set_cache_root"} <= set(applied)
    assert ("restore_generate:BertLMHeadModel" in applied) == (before[0] == "False")
    assert ("reexport_pruning_helpers" in applied) == (TRANSFORMERS >= (4, 56))
    if TRANSFORMERS >= (4, 52):
        assert before[0] == "False"


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
    import torch
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
