"""What an EVLGen model says: captions, answers, and captions drawn with their log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.models.language.packing import own_rows


class Generates:
    """Of a model with `prompts_for(samples)`, `language_model` and `prompt`, its text in front of every caption."""

    def _prompts(self, samples: dict, batch: int) -> list[str]:
        prompt = samples.get("prompt", self.prompt)
        prompts = [prompt] * batch if isinstance(prompt, str) else list(prompt)
        if len(prompts) != batch:
            raise ValueError(f"{len(prompts)} prompts for {batch} pictures or texts; give one, or one for each")
        return prompts

    @torch.no_grad()
    def generate(
        self,
        samples: dict,
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
        visual_prompt: VisualPrompt | None = None,
    ) -> list[str]:
        """Captions of samples["image"] (B, 3, H, W): B x num_captions strings, as LAVIS's Blip2OPT.generate.

        Beam search, or nucleus sampling of num_captions each. Lengths count new tokens. samples["prompt"] (one
        string or one a picture) replaces the model's prompt. samples["question"] (likewise) is what merging looks at
        with model.condition=question. A `visual_prompt` already computed is used as is.
        """
        prompt = visual_prompt or self.prompts_for(samples)
        decoding = {"max_new_tokens": max_length, "min_new_tokens": min_length, "num_return_sequences": num_captions}
        if use_nucleus_sampling:
            decoding |= {"do_sample": True, "top_p": top_p, "temperature": temperature, "top_k": 0, "num_beams": 1}
        else:
            if num_captions > num_beams:
                raise ValueError(f"num_captions={num_captions} needs num_beams >= {num_captions}, got {num_beams}")
            decoding |= {"do_sample": False, "num_beams": num_beams, "length_penalty": length_penalty}
        return self.language_model.generate(
            prompt.tokens,
            self._prompts(samples, len(prompt.tokens)),
            prompt.mask,
            repetition_penalty=repetition_penalty,
            **decoding,
        )

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict,
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: list[str] | None = None,
        prompt: str = "",
        length_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        visual_prompt: VisualPrompt | None = None,
        **kwargs,
    ) -> list[str]:
        """Short answers to samples["text_input"] (B questions), each in `prompt` ("Question: {} Short answer:").

        Questions of different length are left-padded. Only inference_method="generate" is known. A `visual_prompt`
        already computed is used as is. repetition_penalty: 1.5 with Vicuna as released.
        """
        if inference_method != "generate":
            raise ValueError(f"inference_method: {inference_method!r}; EVLGen answers by 'generate' only")
        questions = samples["text_input"]
        questions = [questions] if isinstance(questions, str) else questions
        template = prompt or "Question: {} Short answer:"
        asked = {**samples, "question": questions, "prompt": [template.format(question) for question in questions]}
        return self.generate(
            asked,
            num_beams=num_beams,
            max_length=max_len,
            min_length=min_len,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            visual_prompt=visual_prompt,
        )

    @torch.no_grad()
    def sample(self, prompt: VisualPrompt, samples: dict, **sampling) -> list[list[int]]:
        """Token ids of captions drawn under these prompts, a picture's in a row; as LanguageModel.sample."""
        prompts = self._prompts(samples, len(prompt.tokens))
        return self.language_model.sample(prompt.tokens, prompts, prompt.mask, **sampling)

    def log_probs_of(
        self, prompt: VisualPrompt, samples: dict, sampled: list[list[int]], temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability (N,) in nats of sampled ids, as many for each picture, and tokens (N,); differentiable.

        Captions of a picture share its visual prompt where the language model lets them (LanguageModel.packs).
        """
        pictures = len(prompt.tokens)
        counts = [len(sampled) // pictures] * pictures
        prompts = [text for text in self._prompts(samples, pictures) for _ in range(counts[0])]
        visual, mask, lm = prompt.tokens, prompt.mask, self.language_model
        if counts[0] > 1 and not lm.packs():
            (visual, mask), counts = own_rows(visual, mask, counts), None  # (N, L', D_l)
        return lm.log_probs(visual, sampled, prompts, mask, temperature, counts)
