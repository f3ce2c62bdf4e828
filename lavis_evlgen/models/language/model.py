"""A causal language model and its tokenizer behind one interface: a loss and a generator. Frozen, unless it is told.

OPT, LLaMA, Vicuna, Qwen, SmolLM and any other `AutoModelForCausalLM` differ in tokenizer facts, not in class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessorList

from lavis_evlgen.models.compile import eager
from lavis_evlgen.models.language.chat import ChatEncoder, Message
from lavis_evlgen.models.language.gumbel_sampling import GumbelRows, cache_key, decode, up_to_end
from lavis_evlgen.models.language.llm_train import Lora, make_trainable
from lavis_evlgen.models.language.packing import checked_counts, own_rows
from lavis_evlgen.models.language.prompt_attention import PromptAttention
from lavis_evlgen.models.language.sequences import Sequences, pads_to
from lavis_evlgen.models.language.tokenizer import TextEncoder
from lavis_evlgen.models.precision import freeze
from lavis_evlgen.nn.losses import IGNORE


class LanguageModel(Sequences, nn.Module):
    """`loss(visual_prompt, texts, prompts)` and `generate(visual_prompt, prompts, **decoding)`.

    Sequence: `[visual prompt][BOS][prompt][caption]` (bos="after", released) or
    `[BOS][visual prompt][prompt][caption]` (bos="before"). Right padding for the loss, left for generation.

    bos_token: as TextEncoder. label_bos: whether `loss` counts the BOS behind the visual prompt as a label where the
    prompt is empty; None: as the released code does with this family of language models. prompt_attention: causal,
    visual or prefix (prompt_attention.py). llm_train: what of the language model learns (None: nothing); llm_adapter:
    the folder that LoRA starts from (llm_train.py). chat_template: what renders conversations (chat.py). Raises
    ValueError.
    """

    def __init__(
        self,
        llm: nn.Module,
        tokenizer,
        bos: str = "after",
        max_txt_len: int = 32,
        bos_token: str | None = None,
        label_bos: bool | None = None,
        prompt_attention: str = "causal",
        llm_train: str | Lora | None = None,
        llm_adapter: str | None = None,
        chat_template: str | None = None,
    ):
        super().__init__()
        if bos not in ("before", "after"):
            raise ValueError(f"bos: {bos!r} is not one of before, after")
        self.llm, self.llm_train = freeze(llm), llm_train
        self.bos, self.max_txt_len = bos, max_txt_len
        self.length_multiple = 1  # of sequences in training: few shapes for a compiler
        self.embed = [llm.get_input_embeddings()]  # in a list: the module stays registered once
        self.text = TextEncoder(tokenizer, llm.config.model_type, self.embed[0].num_embeddings, bos_token)
        self.label_bos, self.chat_template = self._labels_bos(label_bos), chat_template
        self.width = self.embed[0].embedding_dim
        self._check_head()
        self.prompt_attention = PromptAttention(llm, prompt_attention)
        make_trainable(llm, llm_train, llm_adapter)

    def train(self, mode: bool = True):
        super().train(mode)
        self.llm.eval()  # always: without dropout, whether it learns or not
        return self

    def _labels_bos(self, asked: bool | None) -> bool:
        if not (asked is None or isinstance(asked, bool)):
            raise ValueError(f"label_bos: {asked!r} is not true or false; leave it empty for the released behaviour")
        if asked and (self.bos == "before" or self.text.bos_id is None):
            why = "bos=before puts it in front" if self.bos == "before" else "this tokenizer has none"
            raise ValueError(f"label_bos: true needs a BOS behind the visual prompt, and {why}; leave it empty")
        return self.bos == "after" and (self.text.label_bos if asked is None else asked)

    def labelled_bos(self, prompt: str) -> bool:
        """Whether the BOS in front of this prompt and its caption is a label."""
        return self.label_bos and not prompt.strip()

    @property
    def text_limit(self) -> int:
        """Most ids of prompt and caption: as released, max_txt_len counts the BOS that stands in the text."""
        return self.max_txt_len - (self.text.bos_id is not None)

    @cached_property
    def chat(self) -> ChatEncoder:
        """Conversations as ids. Raises ValueError for a tokenizer that cannot."""
        text = self.text
        bos = None if text.bos_id is None else text.tokenizer.convert_ids_to_tokens(text.bos_id)
        return ChatEncoder(text.tokenizer, self.chat_template, bos)

    def check_prompt(self, prompt: str):
        """Raises ValueError for a prompt that leaves no room for a caption: there would be nothing to learn."""
        length = len(self.text.encode(prompt.rstrip()))
        if length >= self.text_limit:
            raise ValueError(
                f"prompt: {prompt!r} is {length} tokens, and max_txt_len={self.max_txt_len} has room for "
                f"{self.text_limit} of prompt and caption together; raise it or shorten the prompt"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.embed[0].weight.dtype

    def embedding_std(self) -> float:
        """Standard deviation of the embedding table: the size of input the model knows."""
        return self.embed[0].weight.float().std().item()

    @torch.no_grad()
    def mean_embeddings(self, texts: list[str]) -> Tensor:
        """(B, D_l) float32: the mean of each text's rows of the embedding table, without BOS and padding; 0 of no text.

        No text's mean depends on the others of the batch.
        """
        rows, table = [self.text.encode(text) for text in texts], self.embed[0].weight
        ids = torch.tensor([one for row in rows for one in row], dtype=torch.long, device=table.device)
        starts = torch.tensor([0, *accumulate(map(len, rows))][:-1], device=table.device)
        return F.embedding_bag(torch.arange(len(ids), device=table.device), table[ids].float(), starts, mode="mean")

    @torch.no_grad()
    def _check_head(self):
        """The loss calls body and head apart; a model that does more in between must not be scored wrongly."""
        weight = self.embed[0].weight
        if weight.device.type == "meta":
            return
        ids = torch.tensor([[0, 1]], device=weight.device)
        whole = self.llm(input_ids=ids).logits.float()
        apart = self._head(self.body(self.embed[0](ids))).float()
        if not torch.allclose(whole, apart, rtol=1e-2, atol=1e-2 * whole.abs().max().item()):
            raise ValueError(
                f"{type(self.llm).__name__} post-processes its logits (soft cap or scale): its loss cannot be "
                "computed on supervised positions alone; use another language model"
            )

    def loss(
        self,
        visual: Tensor,
        texts: list[str],
        prompts: list[str],
        mask: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """visual (B, P, D_l), mask (B, P) | None -> per text: summed cross-entropy (N,) in nats, tokens (N,).

        counts: how many of the texts each picture has, a picture's in a row, which share its visual prompt; None: one
        each. Raises ValueError for counts of other texts, and for a language model in which texts cannot share.
        """
        counts = checked_counts(counts, len(visual), len(texts))
        pairs = [self.text.caption(p, t, self.text_limit) for p, t in zip(prompts, texts, strict=True)]
        for prompt, (_, labels) in zip(prompts, pairs, strict=True):
            if all(label == IGNORE for label in labels):
                self.check_prompt(prompt)
        first = [self.text.bos_id if self.labelled_bos(prompt) else IGNORE for prompt in prompts]
        return self._nats(visual, pairs, mask, self._head, first, counts=counts)

    def conversation_loss(
        self,
        visual: Tensor,
        conversations: list[Sequence[Message]],
        mask: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `loss`, of the assistant's words in conversations of at most max_txt_len ids (chat.py).

        The visual prompt stands where a conversation says <image>. With prompt_attention=prefix, what follows it up to
        the assistant's first word is of the prompt; what stands in front of it stays causal. Words of a conversation
        stand in front of the visual prompt, so the conversations of a picture have a row each. Raises ValueError.
        """
        counts = checked_counts(counts, len(visual), len(conversations))
        fronts, rows = zip(*map(self.chat.encode, conversations), strict=True)
        longest = max(len(front.ids) + len(row.ids) for front, row in zip(fronts, rows, strict=True))
        if longest > self.max_txt_len:
            raise ValueError(
                f"a conversation of {longest} tokens is longer than max_txt_len={self.max_txt_len}; raise it, or train "
                "with run.task=evlgen_conversations, which cuts conversations at a turn"
            )
        return self._nats(visual, list(rows), mask, self._head, fronts=list(fronts), counts=counts)

    def log_probs(
        self,
        visual: Tensor,
        sampled: list[list[int]],
        prompts: list[str],
        mask: Tensor | None = None,
        temperature: float = 1.0,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """visual (B, P, D_l), ids that `sample` drew -> per text: log-probability (N,) in nats, tokens (N,).

        Differentiable, and what `sample` drew with at this temperature; an end token counts as any other. prompts: of
        each text; counts: as `loss`.
        """
        counts = checked_counts(counts, len(visual), len(sampled))
        starts = [self.text.encode(p.rstrip()) for p in prompts]
        pairs = [(start + ids, [IGNORE] * len(start) + ids) for start, ids in zip(starts, sampled, strict=True)]
        sums, tokens = self._nats(visual, pairs, mask, lambda hidden: self._head(hidden) / temperature, counts=counts)
        return -sums, tokens

    def token_log_probs(
        self, visual: Tensor, text: str, prompt: str = "", mask: Tensor | None = None
    ) -> tuple[list[int], Tensor]:
        """Of one caption, visual (1, P, D_l): its N ids with the end token, and their log-probabilities (N,), nats."""
        ids, labels = self.text.caption(prompt, text, self.text_limit)
        own = [label for label in labels if label != IGNORE]  # the last N of the sequence
        embeds, mask, members, _ = self._assemble(visual, mask, [ids], [len(ids) - len(own)])  # (1, T, D)
        real = mask[0].bool()
        with self.prompt_attention.within(members[:, real]):
            hidden = self.body(embeds[:, real])[0, -len(own) - 1 : -1]  # (N, D)
        chosen = torch.tensor(own, device=hidden.device).unsqueeze(1)
        return own, self._head(hidden).float().log_softmax(-1).gather(1, chosen).squeeze(1)

    @torch.no_grad()
    def generate(
        self, visual: Tensor, prompts: list[str], mask: Tensor | None = None, **decoding
    ) -> list[str]:
        """visual (B, P, D_l) -> B x num_return_sequences texts; decoding: Hugging Face `generate` arguments."""
        return self.text.decode(self._generate(visual, prompts, mask, **decoding))

    @torch.no_grad()
    def sample(
        self,
        visual: Tensor,
        prompts: list[str],
        mask: Tensor | None = None,
        *,
        seeds: list[int],
        num_samples: int = 1,
        greedy: bool = False,
        max_new_tokens: int = 20,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[list[int]]:
        """Token ids of captions drawn for visual (B, P, D_l): num_samples a picture, the end token included.

        seeds: one a picture, which its captions are a function of. greedy: the greedy caption of each picture comes
        before its drawn ones. Every row of the search is one of these, so the greedy ones cost no pass of their own.
        The prompt of a picture is read once for all of them where the language model takes a cache that can be copied.
        """
        drawing = GumbelRows(seeds, num_samples, greedy, temperature, top_p, visual.device)
        if cache_key(self.llm):
            with self._prompted(visual, prompts, mask) as (embeds, mask):
                ids = decode(self, embeds, mask, drawing, max_new_tokens)
            return up_to_end(ids, self.text.end_id)
        visual, mask = own_rows(visual, mask, [drawing.group] * len(visual))
        ids = self._generate(
            visual,
            [prompt for prompt in prompts for _ in range(drawing.group)],
            mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([drawing]),
        )
        return up_to_end(ids, self.text.end_id)

    @contextmanager
    def _prompted(self, visual: Tensor, prompts: list[str], mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeddings (B, T, D) and mask (B, T), padded on the left; inside, the prompt is read as it should be."""
        rows = [self.text.encode(p.rstrip()) for p in prompts]
        ragged = mask is not None
        embeds, mask, members, _ = self._assemble(visual, mask, rows, [len(row) for row in rows])
        embeds, mask, members = pads_to("left", mask, embeds, mask, members)
        if ragged:  # no row may be as long as the longest visual prompt could be
            longest = int(mask.sum(1).max())
            embeds, mask, members = (each[:, -longest:] for each in (embeds, mask, members))
        with eager(), self.prompt_attention.within(members):
            yield embeds, mask

    def _generate(self, visual: Tensor, prompts: list[str], mask: Tensor | None, **decoding) -> Tensor:
        """Generated ids (N, T), without the prompt."""
        with self._prompted(visual, prompts, mask) as (embeds, mask):
            return self.llm.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                eos_token_id=self.text.end_id,
                pad_token_id=self.text.pad_id,
                **decoding,
            )
