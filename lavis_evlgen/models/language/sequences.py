"""Visual prompts and texts as sequences of a language model, and the cross-entropy of their labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lavis_evlgen.models.language.chat import Labelled
from lavis_evlgen.models.language.packing import TextRows, own_rows
from lavis_evlgen.models.language.tokenizer import pad_rows
from lavis_evlgen.nn.losses import IGNORE, prefix_lm_loss

Pair = tuple[list[int], list[int]]  # ids and labels of a text
PACKED = 4  # rows of several texts are padded to multiples as many times larger: they differ more in length


class Sequences:
    """Of a LanguageModel with `llm`, `embed`, `text`, `bos`, `prompt_attention` and `length_multiple`."""

    def body(self, embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Last hidden states (B, T, D_l) of embeddings (B, T, D_l), mask (B, T) | None: nothing is padded on the left.

        That is said by ones: given no mask, transformers looks for several texts in a row and makes a table of them.
        """
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        return self.llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.llm.get_output_embeddings()(hidden)

    def check_packing(self):
        """Raise ValueError where texts cannot share a visual prompt: the language model would let them see each other.

        Tried with random embeddings when it is first asked, here or by the first loss of several texts a picture.
        """
        if why := self.prompt_attention.why_not_packing(self.llm):
            raise ValueError(
                f"the texts of a picture cannot share its visual prompt in {type(self.llm).__name__}: {why}; give each "
                "picture one text (texts_per_image=1), or use another language model"
            )

    def packs(self) -> bool:
        """Whether texts can share a visual prompt in this language model (check_packing)."""
        return not self.prompt_attention.why_not_packing(self.llm)

    def _assemble(
        self,
        visual: Tensor,
        visual_mask: Tensor | None,
        rows: list[list[int]],
        prompt_lengths: list[int],
        front: list[list[int]] | None = None,
    ):
        """Embeddings (B, T, D), mask (B, T), members of the prompt (B, T), the column where the text rows start.

        Padded on the right. prompt_lengths: ids of the text prompt that each row begins with. front: ids in front of
        each visual prompt, padded on the left, of texts that bring their BOS; None: the BOS stands where `bos` says.
        """
        batch, n_visual, _ = visual.shape
        bos, first = self._bos_ids, 0
        if front is None and self.bos == "after":
            rows, first = [bos + row for row in rows], len(bos)
        elif front is None:
            front = [bos] * batch
        ids = pad_rows(rows, self.text.pad_id, "right", visual.device)  # (B, S)
        mask = pad_rows([[1] * len(row) for row in rows], 0, "right", visual.device)
        if visual_mask is None:
            visual_mask = mask.new_ones(batch, n_visual)
        parts, masks = [visual.to(self.dtype), self.embed[0](ids)], [visual_mask.long(), mask]
        members = [visual_mask.bool(), self._prompt_members(mask, prompt_lengths, first)]
        if front and any(front):
            before = pad_rows(front, self.text.pad_id, "left", visual.device)  # (B, F)
            parts.insert(0, self.embed[0](before))
            masks.insert(0, pad_rows([[1] * len(row) for row in front], 0, "left", visual.device))
            members.insert(0, torch.zeros_like(before, dtype=torch.bool))
        embeds, mask = torch.cat(parts, 1), torch.cat(masks, 1)
        return embeds, mask, torch.cat(members, 1), embeds.shape[1] - ids.shape[1]

    @property
    def _bos_ids(self) -> list[int]:
        return [] if self.text.bos_id is None else [self.text.bos_id]

    def _prompt_members(self, mask: Tensor, prompt_lengths: list[int], first: int) -> Tensor:
        """Of text rows (B, S), which tokens see each other with the visual prompt: (B, S). first: where texts start."""
        if self.prompt_attention.kind != "prefix":
            return torch.zeros_like(mask, dtype=torch.bool)
        positions = torch.arange(mask.shape[1], device=mask.device)
        ends = torch.tensor(prompt_lengths, device=mask.device).unsqueeze(1) + first
        return (positions >= first) & (positions < ends)

    def _nats(
        self,
        visual: Tensor,
        pairs: list[Pair],
        mask: Tensor | None,
        head,
        first: list[int] | None = None,
        fronts: list[Labelled] | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy (N,) of the labels of (ids, labels) after the visual prompt, and their number (N,).

        first: the label of each text's BOS, where that stands behind the visual prompt; None: it has none. fronts: of
        texts that bring their BOS, what stands in front of the visual prompt. counts: texts of each picture; None: 1.
        """
        lengths = [next((n for n, label in enumerate(labels) if label != IGNORE), len(labels)) for _, labels in pairs]
        first = [IGNORE] * len(pairs) if first is None else first
        if counts is not None:
            # a visual prompt that stands behind words of its text, or sees them, is another for each text
            sees_texts = self.prompt_attention.kind == "prefix" and any(lengths)
            if fronts is None and not sees_texts:
                return self._packed_nats(visual, pairs, mask, head, first, counts)
            visual, mask = own_rows(visual, mask, counts)
        front = None if fronts is None else [own.ids for own in fronts]
        short = mask is not None and not self.training  # perhaps no row is as long as the longest prompt could be
        ragged = mask is not None or len({len(ids) for ids in front or []}) > 1
        embeds, mask, members, start = self._assemble(visual, mask, [ids for ids, _ in pairs], lengths, front)
        extra = embeds.shape[1] - start - max(len(ids) for ids, _ in pairs)  # BOS in the text rows
        rows = [[IGNORE] * start + [bos] * extra + lab for bos, (_, lab) in zip(first, pairs, strict=True)]
        labels = pad_rows(rows, IGNORE, "right", visual.device)
        if fronts is not None:
            before = pad_rows([own.labels for own in fronts], IGNORE, "left", visual.device)  # (B, F)
            labels[:, : before.shape[1]] = before
        if ragged:
            embeds, mask, labels, members = pads_to("right", mask, embeds, mask, labels, members)
        if short:
            longest = int(mask.sum(1).max())
            embeds, labels, members = (each[:, :longest] for each in (embeds, labels, members))
        more = self._more(embeds)
        embeds, labels = F.pad(embeds, (0, 0, 0, more)), F.pad(labels, (0, more), value=IGNORE)
        # all padding is on the right, behind what looks back: no mask is needed, and without one attention is fused
        with self.prompt_attention.within(F.pad(members, (0, more))):
            hidden = self.body(embeds)
        return prefix_lm_loss(hidden, labels, head)

    def _packed_nats(self, visual: Tensor, pairs: list[Pair], mask: Tensor | None, head, first, counts):
        """As `_nats`, the texts of a picture in one row behind its visual prompt (packing.py)."""
        self.check_packing()
        in_text, in_front = (self._bos_ids, []) if self.bos == "after" else ([], self._bos_ids)
        rows = TextRows([in_text + ids for ids, _ in pairs], counts)
        front = [in_front] * len(counts)
        embeds, real, members, start = self._assemble(visual, mask, rows.ids, [0] * len(counts), front)
        if self.prompt_attention.kind == "causal":
            members = torch.zeros_like(members)
        segments, positions = rows.segments_and_positions(real[:, :start])
        more = self._more(embeds, PACKED)
        padded = [F.pad(each, (0, more)) for each in (members, segments, positions)]
        with self.prompt_attention.within(*padded):
            hidden = self.body(F.pad(embeds, (0, 0, 0, more)), F.pad(real, (0, more)))
        labels = [[bos] * len(in_text) + labels for bos, (_, labels) in zip(first, pairs, strict=True)]
        return prefix_lm_loss(*rows.of_each_text(hidden, real[:, :start], labels), head)

    def _more(self, embeds: Tensor, times: int = 1) -> int:
        """Columns of padding behind embeddings (B, T, D) in training, for as few lengths as a compiler can take."""
        return -embeds.shape[1] % (self.length_multiple * times) if self.training and self.length_multiple > 1 else 0


def pads_to(side: str, mask: Tensor, *rows: Tensor) -> list[Tensor]:
    """Move the masked columns of each of `rows` (B, T, ...) to one side, the rest in order.

    Positions then count real tokens only, for every model.
    """
    order = mask.argsort(dim=1, stable=True, descending=side == "right")  # (B, T)
    batch = torch.arange(len(mask), device=mask.device).unsqueeze(1)  # (B, 1)
    return [row[batch, order] for row in rows]
