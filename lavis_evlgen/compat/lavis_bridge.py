"""Every bridge over a difference between LAVIS 1.0.2 and what it runs on, each with its reason.

LAVIS 1.0.2 was written for transformers 4.25 and for one cluster. What is here makes `import lavis`
and its models work on transformers 4.49 to 4.57; each bridge looks whether it is needed, does one
thing, and is recorded in `applied()`. No LAVIS file is edited, and no warning is silenced but those
that `import lavis` itself raises about torch's old names. `lavis_import` calls this when LAVIS is imported.
"""

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
from PIL import Image, ImageOps

from lavis_evlgen.compat import environment, transformers5

log = logging.getLogger(__name__)

_applied: list[tuple[str, str]] = []
_done = False

PRUNING_HELPERS = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")
# what `import lavis` imports for a function or two, up to a second each; of some, functions are imported by name
BY_NAME = {"sklearn.metrics": ("roc_curve",), "scipy.optimize": ("linear_sum_assignment",)}
HEAVY = ("pandas", "spacy", *BY_NAME)
# the two LAVIS classes that BLIP-2's stages generate with
GENERATING = (
    ("lavis.models.blip2_models.Qformer", "BertLMHeadModel"),
    ("lavis.models.blip2_models.modeling_opt", "OPTForCausalLM"),
)
BERTS = ("lavis.models.med", "lavis.models.blip_models.nlvr_encoder", "lavis.models.blip2_models.Qformer")
# LAVIS's classes whose output weights are their embeddings, in the words of transformers 5: target -> source
_BERT_TIED = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
_OPT_TIED = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
TIED = (
    ("lavis.models.med", "BertLMHeadModel", _BERT_TIED),
    ("lavis.models.med", "BertForMaskedLM", _BERT_TIED),
    ("lavis.models.blip2_models.Qformer", "BertLMHeadModel", _BERT_TIED),
    ("lavis.models.blip2_models.Qformer", "BertForMaskedLM", _BERT_TIED),
    ("lavis.models.blip2_models.modeling_opt", "OPTForCausalLM", _OPT_TIED),
)
# what BLIP-2's `generate` repeats for the beams before it calls these (blip2_opt.py:215, blip2_qformer.py:289)
REPEATED_BY_LAVIS = ("query_embeds", "encoder_hidden_states", "encoder_attention_mask")


def before_import() -> None:
    """What has to be in place before the first `import lavis`."""
    environment.import_torchvision()  # LAVIS would, and its error would not say what to do
    reexport_pruning_helpers()
    supply_model_parallel_utils()


@contextmanager
def without_import_warnings():
    """Within: no warnings of LAVIS's old imports, at which its users can do nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*(torch.jit.script|torch.cuda.amp)")
        yield


class _Later(ModuleType):
    """In place of a module that is imported when something of it is first asked for."""

    def __getattr__(self, name):
        if name in BY_NAME.get(self.__name__, ()):
            return lambda *args, **kwargs: self._now(name)(*args, **kwargs)
        if self.__name__ in BY_NAME and name.startswith("__"):  # `from ... import` asks for __path__
            raise AttributeError(name)
        return self._now(name)

    def _now(self, name):
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def without_heavy_imports(names=None):
    """Within: `import spacy` waits until something of spacy is used, and so for the other `names`, or all of HEAVY."""
    placed = {}
    for name in names or HEAVY:
        package = name.partition(".")[0]  # finding a module of a package would import the package
        if name not in sys.modules and (spec := importlib.util.find_spec(package)) is not None:
            placed[name] = sys.modules[name] = _Later(name)
            placed[name].__spec__ = spec  # `find_spec` of others reads it
    try:
        yield
    finally:
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def after_import() -> None:
    """Apply the bridges that need LAVIS imported, once; a second call does nothing."""
    global _done
    if _done:
        return
    supply_model_methods()
    restore_generate()
    repeat_for_beams_once()
    keep_mask_of_queries()
    contrast_without_processes()
    stretch_contrast()
    register_runners_and_schedulers()
    set_cache_root()
    _done = True


def applied() -> list[tuple[str, str]]:
    """(name, reason) of each bridge that was found necessary, in order."""
    return list(_applied)


def _record(name: str, reason: str) -> None:
    _applied.append((name, reason))
    log.debug("LAVIS bridge %s: %s", name, reason)


def reexport_pruning_helpers() -> None:
    """transformers >= 4.56 dropped three re-exports that `lavis/models/med.py:40` imports; 5 dropped one itself."""
    from transformers import modeling_utils, pytorch_utils

    if not hasattr(pytorch_utils, "find_pruneable_heads_and_indices"):
        pytorch_utils.find_pruneable_heads_and_indices = transformers5.find_pruneable_heads_and_indices
        _record(
            "find_pruneable_heads_and_indices",
            "transformers.pytorch_utils has it no longer (>= 5), and `import lavis` needs it",
        )
    missing = [name for name in PRUNING_HELPERS if not hasattr(modeling_utils, name)]
    for name in missing:
        setattr(modeling_utils, name, getattr(pytorch_utils, name))
    if missing:
        _record(
            "reexport_pruning_helpers",
            f"transformers.modeling_utils no longer re-exports {', '.join(missing)} (>= 4.56), "
            "which `import lavis` needs",
        )


def supply_model_parallel_utils() -> None:
    """transformers 5 dropped a module that `lavis/models/blip2_models/modeling_t5.py:51` imports."""
    name = "transformers.utils.model_parallel_utils"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    module = ModuleType(name, "In place of a module that transformers 5 dropped (lavis_evlgen/compat).")
    module.assert_device_map, module.get_device_map = transformers5.assert_device_map, transformers5.get_device_map
    sys.modules[name] = module
    _record("supply_model_parallel_utils", f"{name} is gone (>= 5), and `import lavis` needs it")


def supply_model_methods() -> None:
    """transformers 5 dropped methods that LAVIS's own BERTs call, and no longer ties weights that are not named."""
    from transformers import PreTrainedModel

    if hasattr(PreTrainedModel, "invert_attention_mask"):
        return
    for module_name in BERTS:
        base = importlib.import_module(module_name).BertPreTrainedModel
        for name in ("get_head_mask", "invert_attention_mask", "init_weights", "tie_weights"):
            setattr(base, name, getattr(transformers5, name))
        base._init_weights = transformers5.with_what_no_file_holds(base._init_weights)
    for module_name, class_name, tied in TIED:
        getattr(importlib.import_module(module_name), class_name)._tied_weights_keys = tied
    _record(
        "supply_model_methods",
        "transformers.PreTrainedModel has no get_head_mask and invert_attention_mask, and init_weights() no longer "
        "does what post_init() does (>= 5), for LAVIS's BERTs and OPT",
    )


def restore_generate() -> None:
    """In transformers >= 4.52 `PreTrainedModel` is no `GenerationMixin`: LAVIS's classes lost `generate`."""
    from transformers import GenerationMixin

    for module_name, class_name in GENERATING:
        model_class = getattr(importlib.import_module(module_name), class_name)
        if issubclass(model_class, GenerationMixin):
            continue
        # last in the order, where it also stood while PreTrainedModel inherited from it, so that
        # LAVIS's own prepare_inputs_for_generation and _reorder_cache keep winning
        model_class.__bases__ += (GenerationMixin,)
        _record(
            f"restore_generate:{class_name}",
            f"{module_name}.{class_name} has no `generate` because PreTrainedModel is no longer a "
            "GenerationMixin (>= 4.52)",
        )


def repeat_for_beams_once() -> None:
    """LAVIS repeats the visual prompt for the beams itself; transformers >= 4.27 repeats all it is given.

    Beam search (and several samples of a picture) then met num_beams times too many rows and failed. What comes
    with a row for every beam is left as it is; what comes with a row for every picture is repeated.
    """
    from transformers import GenerationMixin

    for module_name, class_name in GENERATING:
        model_class = getattr(importlib.import_module(module_name), class_name)
        if model_class._expand_inputs_for_generation is not GenerationMixin._expand_inputs_for_generation:
            continue
        model_class._expand_inputs_for_generation = _repeat_unrepeated
        _record(
            f"repeat_for_beams_once:{class_name}",
            f"BLIP-2's generate repeats {', '.join(REPEATED_BY_LAVIS)} num_beams times, and transformers "
            f"would do so again in {module_name}.{class_name}",
        )


def keep_mask_of_queries() -> None:
    """transformers 5 drops an attention mask of ones, and LAVIS's OPT then makes one that leaves the queries out."""
    import transformers

    if environment.release(transformers.__version__) < (5,):
        return
    opt = importlib.import_module("lavis.models.blip2_models.modeling_opt").OPTForCausalLM
    prepare = opt.prepare_inputs_for_generation

    def prepare_inputs_for_generation(self, input_ids=None, query_embeds=None, attention_mask=None, **kwargs):
        if attention_mask is None and query_embeds is not None:
            attention_mask = input_ids.new_ones(len(input_ids), query_embeds.shape[1] + input_ids.shape[1])
        return prepare(self, input_ids, query_embeds=query_embeds, attention_mask=attention_mask, **kwargs)

    opt.prepare_inputs_for_generation = prepare_inputs_for_generation
    _record(
        "keep_mask_of_queries",
        "transformers' generate() hands on no attention mask where it is all ones (>= 5), and LAVIS's OPT, whose mask "
        "is of queries and prompt, then makes one of the prompt alone",
    )


def _repeat_unrepeated(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
    """In place of GenerationMixin._expand_inputs_for_generation: (input_ids, model_kwargs), a row for each beam."""
    from transformers import GenerationMixin

    rows = None if input_ids is None else len(input_ids) * expand_size
    there = {k: v for k in REPEATED_BY_LAVIS if (v := model_kwargs.get(k)) is not None and len(v) == rows}
    others = {k: v for k, v in model_kwargs.items() if k not in there}
    # a static method up to transformers 4
    expand = vars(GenerationMixin)["_expand_inputs_for_generation"].__get__(self)
    input_ids, others = expand(
        expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **others
    )
    return input_ids, others | there


def contrast_without_processes() -> None:
    """BLIP-2's first stage asks for its rank and gathers from others even where there is one process and no group.

    Its module gets functions in place of `torch.distributed` and of the two gathers that answer then, too, and
    that `on_this_rank_alone` can keep from talking.
    """
    from lavis.common import dist_utils

    module = importlib.import_module("lavis.models.blip2_models.blip2_qformer")
    if isinstance(module.dist, SimpleNamespace):
        return

    def unless_alone(gather):
        return lambda tensors: tensors if _alone() else gather(tensors)

    def _alone() -> bool:
        return _on_this_rank_alone or not dist_utils.is_dist_avail_and_initialized()

    module.dist = SimpleNamespace(get_rank=lambda: 0 if _alone() else dist_utils.get_rank())
    module.all_gather_with_grad = unless_alone(module.all_gather_with_grad)
    module.concat_all_gather = unless_alone(module.concat_all_gather)
    _record(
        "contrast_without_processes",
        "lavis.models.blip2_models.blip2_qformer calls dist.get_rank() and gathers without a process group (line 153)",
    )


_on_this_rank_alone = False


@contextmanager
def on_this_rank_alone():
    """Within: BLIP-2's first stage contrasts a rank's own pictures only, so ranks may have unlike batches."""
    global _on_this_rank_alone
    before, _on_this_rank_alone = _on_this_rank_alone, True
    try:
        yield
    finally:
        _on_this_rank_alone = before


def stretch_contrast() -> None:
    """RandAugment's AutoContrast (lavis/processors/randaugment.py:42) negates a byte: -low wraps around to 256 - low.

    Every picture without black pixels then becomes white; `blip_image_train` and others draw it often.
    """
    from lavis.processors import randaugment

    grey = np.array([[[100], [150]]], np.uint8).repeat(3, axis=2)  # (1, 2, 3), to become black and white
    with np.errstate(over="ignore"):
        if np.array_equal(randaugment.func_dict["AutoContrast"](grey), _autocontrast(grey)):
            return
    randaugment.func_dict["AutoContrast"] = _autocontrast
    _record("stretch_contrast", "LAVIS's AutoContrast makes pictures white")


def _autocontrast(img, cutoff=0):
    """uint8 (H, W, 3) -> the same with each colour stretched to 0..255."""
    return np.array(ImageOps.autocontrast(Image.fromarray(img), cutoff))


def register_runners_and_schedulers() -> None:
    """`import lavis` registers no runner and no learning-rate schedule; importing them does."""
    from lavis.common.registry import registry

    for module_name, mapping in (
        ("lavis.runners", "runner_name_mapping"),
        ("lavis.common.optims", "lr_scheduler_name_mapping"),
    ):
        before = len(registry.mapping[mapping])
        importlib.import_module(module_name)
        if len(registry.mapping[mapping]) > before:
            _record(f"register:{module_name}", f"`import lavis` alone leaves {mapping} empty")


def set_cache_root() -> None:
    """LAVIS's cache folder is a path of its authors' cluster; `register_path` refuses to change it.

    `$LAVIS_CACHE` names another folder than `~/.cache/lavis`. It is made when first written to.
    """
    from lavis.common.registry import registry

    cache_root = str(Path(os.environ.get("LAVIS_CACHE") or "~/.cache/lavis").expanduser())
    fixed = registry.mapping["paths"]["cache_root"]
    if fixed != cache_root:
        registry.mapping["paths"]["cache_root"] = cache_root
        _record("set_cache_root", f"{fixed}, a folder of LAVIS's authors, is {cache_root} now")


def refresh_model_zoo() -> None:
    """List models that registered after LAVIS was imported: `lavis.models.model_zoo` is frozen by then.

    The existing object is updated, because `from lavis.models import model_zoo` hands out that one.
    """
    from lavis.models import ModelZoo, model_zoo

    model_zoo.model_zoo = ModelZoo().model_zoo
