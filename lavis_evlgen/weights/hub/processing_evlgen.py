"""Pictures and texts of an EVLGen model for transformers."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

IMAGE = "<image>"  # stands in a text where the picture is


class EvlgenImageProcessor(BaseImageProcessor):
    """A whole picture, resized bicubically by Pillow to a square, normalised: (3, H, W), float32.

    size: {"height", "width"} in pixels; image_mean, image_std: of each colour, pixels in 0..1.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size=None, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), **kwargs):
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 224, "width": 224})
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def __call__(self, images, **kwargs):
        return self.preprocess(images, **kwargs)

    def preprocess(self, images, return_tensors="pt", **kwargs) -> BatchFeature:
        """images: one picture or a list of them (Pillow's, arrays (H, W, 3) of bytes, paths, addresses)."""
        pixels = torch.stack([self._tensor(picture) for picture in _flat(images)])  # (B, 3, H, W)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _tensor(self, picture) -> torch.Tensor:
        square = to_rgb(picture).resize((self.size["width"], self.size["height"]), Image.Resampling.BICUBIC)
        colours = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div_(255)  # (3, H, W)
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.image_mean, self.image_std))
        return colours.sub_(mean).div_(std)


def to_rgb(picture) -> Image.Image:
    """Upright RGB; what is transparent becomes white, 16 bits are scaled. Raises ValueError."""
    if isinstance(picture, str):
        picture = load_image(picture)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"a picture of type {type(picture).__name__}: give Pillow's, an array of bytes, or a path")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _flat(images) -> list:
    """One picture, a list, or lists of one each, as a list."""
    if not isinstance(images, list | tuple):
        return [images]
    return [one for each in images for one in _flat(each)]


class EvlgenProcessor(ProcessorMixin):
    """Pictures, each with a text or none, to `pixel_values`, `input_ids` and `attention_mask`.

    A text follows its picture, behind BOS as the model was trained (`bos`: before or after the picture; `bos_token_id`:
    None for none). One that says <image> brings its own: the picture stands there, and nothing is added. No text:
    `prompt`. `end_token_id` ends what the model says; `image_token_id` stands for the picture.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"

    def __init__(
        self, image_processor=None, tokenizer=None, bos="after", bos_token_id=None, end_token_id=None,
        image_token_id=None, prompt="", chat_template=None,
    ):  # fmt: skip
        self.bos, self.bos_token_id, self.end_token_id = bos, bos_token_id, end_token_id
        self.image_token_id, self.prompt = image_token_id, prompt
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, return_tensors="pt", **kwargs) -> BatchFeature:
        """images: one or a list; text: one for all, or a list. Rows are padded on the left, whatever kwargs say.

        Raises ValueError without pictures, and where there are not as many texts.
        """
        if images is None:
            raise ValueError("images: left out; this model sees a picture with every text")
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"]
        texts = [text] * len(pixels) if text is None or isinstance(text, str) else list(text)
        if len(texts) != len(pixels):
            raise ValueError(f"{len(texts)} texts for {len(pixels)} pictures; give one, or one for each")
        rows = [self.ids(one) for one in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[self.image_token_id] * (width - len(row)) + row for row in rows])  # (B, S)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
        return BatchFeature(batch, tensor_type=return_tensors)

    def ids(self, text: str | None = None) -> list[int]:
        """Ids of one text, the picture's among them. Raises ValueError for a text with several pictures."""
        text, picture = self.prompt if text is None else text, [self.image_token_id]
        if IMAGE in text:
            front, *behind = text.split(IMAGE)
            if len(behind) > 1:
                raise ValueError(f"a text says {IMAGE} {len(behind)} times; this model sees one picture")
            return self._encode(front) + picture + self._encode(behind[0])
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        start = bos + picture if self.bos == "before" else picture + bos
        return start + self._encode(text.rstrip())

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def apply_chat_template(self, conversation, tokenize=False, chat_template=None, **kwargs):
        """A conversation in transformers' form, or a list of them, as text; `tokenize`: as what the model takes.

        The picture stands where its part of a message does, on a line of its own, as in training. Raises ValueError for
        a tokenizer without a chat template.
        """
        options = {k: kwargs.pop(k) for k in ("return_tensors", "return_dict", "padding") if k in kwargs}
        several = isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
        chats = [getattr(chat, "messages", chat) for chat in (conversation if several else [conversation])]
        found = [_words_and_pictures(chat) for chat in chats]
        kwargs |= {} if chat_template is None else {"chat_template": chat_template}
        texts = [self.tokenizer.apply_chat_template(words, tokenize=False, **kwargs) for words, _ in found]
        if not tokenize:
            return texts if several else texts[0]
        pictures = [picture for _, pictures in found for picture in pictures]
        return self(pictures, texts, return_tensors=options.get("return_tensors") or "pt")

    def batch_decode(self, sequences, skip_special_tokens=True, **kwargs) -> list[str]:
        """Generated ids -> text in front of the end token of each."""
        rows = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        return [self.decode(row, skip_special_tokens, **kwargs) for row in rows]

    def decode(self, ids, skip_special_tokens=True, **kwargs) -> str:
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        ids = ids[: ids.index(self.end_token_id)] if self.end_token_id in ids else ids
        ids = [i for i in ids if i < self.image_token_id]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs).strip()

    post_process_image_text_to_text = batch_decode


def _words_and_pictures(chat) -> tuple[list[dict], list]:
    """Messages whose contents are text, with <image> where a picture is, and the pictures."""
    messages, pictures = [], []
    for message in chat:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        words = [IMAGE if part["type"] == "image" else part["text"] for part in parts]
        seen = [part for part in parts if part["type"] == "image"]
        pictures += [next(part[k] for k in ("image", "url", "path") if k in part) for part in seen if len(part) > 1]
        messages.append({"role": message["role"], "content": "\n".join(words)})
    return messages, pictures
