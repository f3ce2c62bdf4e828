"""A frozen causal language model and its tokenizer behind one interface: a loss and a generator.

OPT, LLaMA, Vicuna, Qwen, SmolLM and any other `AutoModelForCausalLM` differ in tokenizer facts, not in class.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavis_evlgen.environment import require
from lavis_evlgen.models.freezing import DTYPES, freeze
from lavis_evlgen.models.sources import load_from_hub, resolve
from lavis_evlgen.models.tokenization import TextEncoder, pad_rows
from lavis_evlgen.nn.losses import IGNORE, prefix_lm_loss


def load_language_model(source: str, precision: str):
    """(model, tokenizer) from a hub id, a folder, or a .gguf file (de-quantised)."""
    path = resolve(source, "llm_model")
    kwargs = {}
    if path.endswith(".gguf"):
        require("gguf", "quickstart")
        require("accelerate", "quickstart")
        kwargs, path = {"gguf_file": Path(path).name}, str(Path(path).parent)
    tokenizer = load_from_hub(AutoTokenizer.from_pretrained, path, "llm_model", **kwargs)
    if kwargs:
        _read_gguf_special_tokens(tokenizer, Path(path) / kwargs["gguf_file"])
    dtype = DTYPES[precision]
    model = load_from_hub(
        AutoModelForCausalLM.from_pretrained, path, "llm_model", torch_dtype=dtype, **kwargs
    )
    return model.to(dtype), tokenizer


def _read_gguf_special_tokens(tokenizer, file: Path):
    """transformers guesses these for some tokenizers (SmolLM2's EOS comes out as its BOS); the file knows."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        field = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if field is not None:
            setattr(tokenizer, ours, tokenizer.convert_ids_to_tokens(int(field.parts[-1][0])))


class LanguageModel(nn.Module):
    """`loss(visual_prompt, texts, prompts)` and `generate(visual_prompt, prompts, **decoding)`.

    Sequence: `[visual prompt][BOS][prompt][caption]` (bos="after", released) or
    `[BOS][visual prompt][prompt][caption]` (bos="before"). Right padding for the loss, left for generation.
    """

    def __init__(self, llm: nn.Module, tokenizer, bos: str = "after", max_txt_len: int = 32):
        super().__init__()
        if bos not in ("before", "after"):
            raise ValueError(f"bos: {bos!r} is not one of before, after")
        self.llm = freeze(llm)
        self.bos, self.max_txt_len = bos, max_txt_len
        self.embed = [llm.get_input_embeddings()]  # in a list: the module stays registered once
        self.text = TextEncoder(tokenizer, llm.config.model_type, self.embed[0].num_embeddings)
        self.width = self.embed[0].embedding_dim
        self._check_head()

    def train(self, mode: bool = True):
        super().train(mode)
        self.llm.eval()  # frozen means eval mode, always
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.embed[0].weight.dtype

    def embedding_std(self) -> float:
        """Standard deviation of the embedding table: the size of input the model knows."""
        return self.embed[0].weight.float().std().item()

    @torch.no_grad()
    def _check_head(self):
        """The loss calls body and head apart; a model that does more in between must not be scored wrongly."""
        weight = self.embed[0].weight
        if weight.device.type == "meta":
            return
        ids = torch.tensor([[0, 1]], device=weight.device)
        whole = self.llm(input_ids=ids).logits.float()
        apart = self._head(self._body(inputs_embeds=self.embed[0](ids))).float()
        if not torch.allclose(whole, apart, rtol=1e-2, atol=1e-2 * whole.abs().max().item()):
            raise ValueError(
                f"{type(self.llm).__name__} post-processes its logits (soft cap or scale): its loss cannot be "
                "computed on supervised positions alone; use another language model"
            )

    def _body(self, **inputs) -> Tensor:
        return self.llm.base_model(**inputs, use_cache=False).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.llm.get_output_embeddings()(hidden)

    def _assemble(self, visual: Tensor, visual_mask: Tensor | None, rows: list[list[int]], side: str):
        """Embeddings (B, T, D), mask (B, T) and the column where the text rows start (right padding)."""
        batch, n_visual, _ = visual.shape
        bos_id = self.text.bos_id
        if bos_id is not None and self.bos == "after":
            rows = [[bos_id, *row] for row in rows]
        ids = pad_rows(rows, self.text.pad_id, side, visual.device)  # (B, S)
        mask = pad_rows([[1] * len(row) for row in rows], 0, side, visual.device)
        if visual_mask is None:
            visual_mask = mask.new_ones(batch, n_visual)
        parts, masks = [visual.to(self.dtype), self.embed[0](ids)], [visual_mask.long(), mask]
        if bos_id is not None and self.bos == "before":
            first = torch.full((batch, 1), bos_id, device=visual.device)
            parts.insert(0, self.embed[0](first))
            masks.insert(0, torch.ones_like(first))
        embeds, mask = torch.cat(parts, 1), torch.cat(masks, 1)
        return embeds, mask, embeds.shape[1] - ids.shape[1]

    def loss(
        self, visual: Tensor, texts: list[str], prompts: list[str], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """visual (B, P, D_l), mask (B, P) | None -> per sample: summed cross-entropy (B,) in nats, tokens (B,)."""
        # as released, max_txt_len counts the BOS that stands in the text
        limit = self.max_txt_len - (self.text.bos_id is not None)
        pairs = [self.text.caption(p, t, limit) for p, t in zip(prompts, texts, strict=True)]
        embeds, mask, start = self._assemble(visual, mask, [ids for ids, _ in pairs], "right")
        extra = embeds.shape[1] - start - max(len(ids) for ids, _ in pairs)  # BOS in the text rows
        labels = pad_rows([[IGNORE] * (start + extra) + lab for _, lab in pairs], IGNORE, "right", visual.device)
        hidden = self._body(inputs_embeds=embeds, attention_mask=mask)
        return prefix_lm_loss(hidden, labels, self._head)

    @torch.no_grad()
    def generate(
        self, visual: Tensor, prompts: list[str], mask: Tensor | None = None, use_cache: bool = True, **decoding
    ) -> list[str]:
        """visual (B, P, D_l) -> B x num_return_sequences texts; decoding: Hugging Face `generate` arguments."""
        rows = [self.text.encode(p.rstrip()) for p in prompts]
        embeds, mask, _ = self._assemble(visual, mask, rows, "left")
        if len({len(row) for row in rows}) > 1:
            embeds, mask = _pads_first(embeds, mask)
        ids = self.llm.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            eos_token_id=self.text.end_id,
            pad_token_id=self.text.pad_id,
            use_cache=use_cache,
            **decoding,
        )
        return self.text.decode(ids)


def _pads_first(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move masked columns to the front, the rest in order: positions then count real tokens only."""
    order = mask.argsort(dim=1, stable=True)  # (B, T): 0s first
    return embeds.gather(1, order.unsqueeze(-1).expand_as(embeds)), mask.gather(1, order)
