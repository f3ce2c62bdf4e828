"""EVLGen for transformers: frozen vision model -> connector -> causal language model. Inference only.

model.safetensors has the parts that were trained; the frozen ones come from where config.json says.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_evlgen import EvlgenConfig
from .connector_evlgen import AveragePooling, LinearConnector, TomeFormerConnector

HUB = ("cache_dir", "token", "force_download", "local_files_only")  # arguments of any download
REFUSED = ("quantization_config", "load_in_4bit", "load_in_8bit", "max_memory", "subfolder", "state_dict")


class EvlgenForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A picture, and a text that follows it, to text. Load it by `from_pretrained`, which also loads the frozen parts.

    >>> model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    >>> processor.batch_decode(model.generate(**processor(images=picture)))
    """

    config_class, main_input_name = EvlgenConfig, "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: EvlgenConfig, vision_model: nn.Module, language_model: nn.Module, vision_dtype=None):
        super().__init__(config)
        kind = config.connector["kind"]
        build = {"tomeformer": TomeFormerConnector, "avgpool": AveragePooling, "linear": LinearConnector}[kind]
        self.visual_encoder = VisionEncoder(vision_model, config, vision_dtype or torch.float32)
        self.ln_vision = nn.LayerNorm(config.vision_width)
        self.connector = build(config)
        self.llm_proj = nn.Linear(config.connector.get("hidden_size", config.vision_width), config.language_width)
        places = torch.zeros(config.soft_prompt_tokens, config.language_width)
        self.soft_prompt = nn.Parameter(places) if config.soft_prompt_tokens else None
        self.language_model = language_model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Of a folder or hub id. dtype (or torch_dtype): of both frozen parts, in place of the config's; device_map:
        one device, such as "cuda". Raises ValueError for what is not supported."""
        folder, download = Path(pretrained_model_name_or_path), {k: kwargs[k] for k in HUB if kwargs.get(k) is not None}
        asked, device = kwargs.get("dtype") or kwargs.get("torch_dtype"), kwargs.get("device_map")
        refused = next((key for key in REFUSED if kwargs.get(key)), None)
        if refused or isinstance(device, dict):
            raise ValueError(f"{refused or 'device_map, of several devices'}: not supported by an EVLGen model")
        if not folder.is_dir():
            folder = Path(snapshot_download(str(folder), revision=kwargs.get("revision"), **download))
        config = EvlgenConfig.from_pretrained(folder) if config is None else config
        vision = _load(AutoModel, folder, config.vision_model, torch.float32, download)
        llm = _load(AutoModelForCausalLM, folder, config.language_model, _dtype(asked, config.language_dtype), download)
        own = llm.get_input_embeddings().embedding_dim
        if own != config.language_width:
            raise ValueError(f"{config.language_model} is {own} wide, and {config.language_width} is needed")
        model = cls(config, vision, llm, _dtype(asked, config.vision_dtype))
        model._load_trained(folder)
        generation = folder / "generation_config.json"
        if generation.exists():  # the language model's own settings, but for what was chosen for this model
            chosen = json.loads(generation.read_text(encoding="utf-8"))
            llm.generation_config.update(**{k: v for k, v in chosen.items() if k != "transformers_version"})
        model.generation_config = llm.generation_config
        if device is not None:
            model.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        return model.eval().requires_grad_(False)

    def _load_trained(self, folder: Path):
        """model.safetensors, and the LoRA adapter beside it, added to the language model's weights."""
        state, prefix = load_file(folder / "model.safetensors"), "language_model.llm."
        llm = {k.removeprefix(prefix): state.pop(k) for k in list(state) if k.startswith(prefix)}
        result = self.load_state_dict(state, strict=False)
        frozen = ("visual_encoder.", "language_model.")
        wrong = [k for k in result.missing_keys if not k.startswith(frozen)] + result.unexpected_keys
        full = {k: v for k, v in llm.items() if ".lora_" not in k}
        wrong += self.language_model.load_state_dict(full, strict=False).unexpected_keys
        if wrong:
            raise ValueError(f"{folder}/model.safetensors is not of its config: {len(wrong)} tensors, {wrong[0]}")
        if len(full) < len(llm):
            add_adapter(self.language_model, folder / "adapter")

    def save_pretrained(self, *args, **kwargs):
        """Not supported: nothing here trains, so a copy of the folder is the same model."""
        raise NotImplementedError("inference only: copy the folder (or repository) that this model was loaded from")

    @property
    def dtype(self) -> torch.dtype:
        """Of pictures and connector; the frozen parts have their own."""
        return self.llm_proj.weight.dtype

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> the visual prompt (B, L', D_l), float32."""
        seen = self.visual_encoder(pixel_values)  # (B, L, D_v)
        with torch.autocast(seen.device.type, enabled=False):
            tokens = self.llm_proj(self.connector(self.ln_vision(seen), seen))  # (B, L', D_l)
        return tokens if self.soft_prompt is None else tokens + self.soft_prompt

    def prompt(self, pixel_values: Tensor, input_ids=None, attention_mask=None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, D_l) and mask (B, T) in front of what is generated, padded on the left.

        The picture's prompt takes the place of `image_token_id`, which every row has once. Raises ValueError.
        """
        visual, embed = self.get_image_features(pixel_values), self.get_input_embeddings()
        if input_ids is None:
            input_ids = torch.tensor([self.config.prompt_ids] * len(visual), device=visual.device)  # (B, S)
        if len(input_ids) != len(visual):
            raise ValueError(f"{len(input_ids)} texts for {len(visual)} pictures; give one for each")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for ids, real, own in zip(input_ids, mask.bool(), visual.to(embed.weight.dtype), strict=True):
            ids = ids[real]
            image = (ids == self.config.image_token_id).nonzero().flatten().tolist()
            if len(image) != 1:
                raise ValueError(f"input_ids: a row has the picture's token ({self.config.image_token_id}) "
                                 f"{len(image)} times; once is needed, as this model's processor has it")  # fmt: skip
            rows.append(torch.cat([embed(ids[: image[0]]), own, embed(ids[image[0] + 1 :])]))  # (T, D_l)
        longest = max(map(len, rows))
        embeds = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
        behind = torch.arange(longest, device=embeds.device) >= longest - lengths.unsqueeze(1)
        return embeds, behind.long()

    def forward(self, pixel_values: Tensor, input_ids=None, attention_mask=None, **kwargs):
        """The language model's output on a prompt: logits (B, T, V), the rows padded on the left."""
        embeds, mask = self.prompt(pixel_values, input_ids, attention_mask)
        if "position_ids" in inspect.signature(self.language_model.forward).parameters:  # others count themselves
            kwargs.setdefault("position_ids", (mask.cumsum(1) - 1).clamp_min(0))
        return self.language_model(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    @torch.no_grad()
    def generate(self, inputs=None, pixel_values=None, input_ids=None, attention_mask=None, **kwargs):
        """Ids of what follows the prompt, without it. kwargs: of the language model's `generate`."""
        embeds, mask = self.prompt(inputs if pixel_values is None else pixel_values, input_ids, attention_mask)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def _load(auto, folder: Path, source: str, dtype: torch.dtype, more: dict) -> nn.Module:
    """A frozen part: of a hub id, or of a folder relative to `folder`. It runs no code of its own."""
    path = str(folder / source) if source.startswith(".") else source
    return auto.from_pretrained(path, torch_dtype=dtype, **more).to(dtype).eval()


def _dtype(asked, said: str) -> torch.dtype:
    """The dtype that the caller asked for, else the config's."""
    asked = said if asked in (None, "auto") else asked
    if asked == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, asked) if isinstance(asked, str) else asked


def add_adapter(llm: nn.Module, folder: Path):
    """Add a LoRA adapter in peft's format to the weights, W + alpha / r B A; peft need not be there."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state, end = load_file(folder / "adapter_model.safetensors"), ".lora_A.weight"
    for name in (name for name in state if name.endswith(end)):
        layer = llm.get_submodule(name.removeprefix("base_model.model.").removesuffix(end))
        b, a = state[name.replace("lora_A", "lora_B")].float(), state[name].float()  # (out, r), (r, in)
        change = config["lora_alpha"] / config["r"] * (b @ a).to(layer.weight.device)
        change = change if isinstance(layer, nn.Linear) else change.T  # GPT-2's Conv1D
        # a parameter of its own: an embedding that is tied to a head stays as it is
        layer.weight = nn.Parameter((layer.weight.float() + change).to(layer.weight.dtype), requires_grad=False)


class VisionEncoder(nn.Module):
    """A frozen vision model: (B, 3, H, W) -> (B, L, D_v), float32. Norms stay float32 whatever the dtype."""

    def __init__(self, model: nn.Module, config: EvlgenConfig, dtype: torch.dtype):
        super().__init__()
        model = getattr(model, "vision_model", model)  # CLIP, SigLIP: the vision half
        own = getattr(model.config, "vision_config", model.config)
        self.compute, self.layer, self.hidden, self.resize = dtype, config.vision_layer, None, {}
        if getattr(own, "image_size", config.image_size) != config.image_size and own.model_type != "dinov2":
            self.resize = {"interpolate_pos_encoding": True}
        if self.layer is not None:
            self._keep_layers(model, own.num_hidden_layers)
        self.model = model
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)

    def _keep_layers(self, model: nn.Module, depth: int):
        """Read the hidden state after block `layer` by a hook; the blocks above it go."""
        wanted = self.layer if self.layer >= 0 else depth + 1 + self.layer
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        del blocks[max(wanted, 1) :]
        if wanted:
            blocks[-1].register_forward_hook(lambda block, given, output: self._keep(output))
        else:
            blocks[0].register_forward_pre_hook(lambda block, given: self._keep(given))

    def _keep(self, output):
        self.hidden = output[0] if isinstance(output, tuple) else output

    def forward(self, pixel_values: Tensor) -> Tensor:
        half = self.compute != torch.float32
        with torch.autocast(pixel_values.device.type, self.compute if half else None, enabled=half):
            output = self.model(pixel_values.float(), **self.resize)
        tokens, self.hidden = output.last_hidden_state if self.layer is None else self.hidden, None
        return tokens.float()
