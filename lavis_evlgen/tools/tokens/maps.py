"""Which patches each token of the visual prompt stands for, layer by layer, and which token each word relies on.

EVLGen's merged-token pictures (figures 4 and 5), for any vision encoder and any connector with a source map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import transforms

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.connectors import build_connector
from lavis_evlgen.nn import MergeMap


@dataclass(frozen=True)
class TokenMap:
    """Where the tokens of one picture are after some layer.

    cells: (rows, columns) int, the token of each patch. num_tokens: all tokens, the `protected` leading ones
    ([CLS], registers), which have no patch, counted.
    """

    cells: np.ndarray
    num_tokens: int
    protected: int

    def sizes(self) -> np.ndarray:
        """Patches of each token that has any, largest first."""
        return np.sort(np.bincount(self.cells.ravel())[np.unique(self.cells)])[::-1]

    def mean_colours(self, picture: np.ndarray) -> np.ndarray:
        """(rows, columns, 3): each patch in the mean colour of its token's patches; picture (H, W, 3) in 0..1."""
        rows, columns = self.cells.shape
        patch_rows, patch_columns = picture.shape[0] // rows, picture.shape[1] // columns
        whole = picture[: rows * patch_rows, : columns * patch_columns]
        patches = whole.reshape(rows, patch_rows, columns, patch_columns, 3).mean((1, 3)).reshape(-1, 3)
        slot = self.cells.ravel()
        sums = np.zeros((self.num_tokens, 3))
        np.add.at(sums, slot, patches)
        means = sums / np.maximum(np.bincount(slot, minlength=self.num_tokens), 1)[:, None]
        return means[slot].reshape(rows, columns, 3)


@dataclass(frozen=True)
class Word:
    """A word of a caption, its log-probability (nats, of all pieces), and its reliance on each token (sums to 1)."""

    text: str
    log_prob: float
    reliance: np.ndarray


def token_map(source: MergeMap, protected: int) -> TokenMap:
    """The map of the first picture of `source` (B, L). Raises ConfigError for patches that are no square."""
    slot = source.slot[0, protected:].cpu().numpy()
    side = round(len(slot) ** 0.5)
    if side**2 != len(slot):
        raise ConfigError(f"evlgen tokens draws squares of patches; this vision encoder gives {len(slot)} patches")
    tokens = int(source.slot[0].max()) + 1  # of this picture: rows of others may be wider
    return TokenMap(slot.reshape(side, side), tokens, protected)


@torch.no_grad()
def layer_maps(
    vision: nn.Module, ln_vision: nn.Module, connector: nn.Module, image: Tensor, condition: Tensor | None = None
) -> list[TokenMap]:
    """Maps of one picture (1, 3, H, W): every patch by itself, then after each layer (merge_at input: after each merge
    before the first one); the last is the visual prompt's. condition (1, D_l): the question's, as Connector's.

    A connector without layers that merge has the first and the last only. Raises ConfigError for one without a
    source map.
    """
    steps, hooks = [], []
    tomeformer = getattr(connector, "tomeformer", None)
    folds = merges_first(connector)
    layers = [] if tomeformer is None or folds else tomeformer.encoder["layer"]
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda module, given, output: steps.append(output[1])))
    try:
        features = vision(image)
        tokens = ln_vision(features)
        source = connector(tokens, condition, return_source=True, features=features).source
    finally:
        for hook in hooks:
            hook.remove()
    if source is None:
        raise ConfigError(
            f"{type(connector).__name__} has no source map: each of its tokens reads every patch. evlgen tokens draws "
            "runs with connector tomeformer (or avgpool, linear)"
        )
    maps = [MergeMap.identity(1, features.shape[1], image.device)]
    if folds:
        maps = tomeformer.fold(features, rho=connector.relevance(tokens, condition))
    for step in steps:
        maps.append(maps[-1] if step is None else maps[-1].then(step))
    if not steps and not folds:
        maps.append(source)
    return [token_map(found, vision.protected) for found in maps]


def merges_first(connector: nn.Module) -> bool:
    """Whether all merging is in front of the connector's first layer (`merge_at: input`)."""
    return hasattr(connector, "tomeformer") and connector.tomeformer.cfg.merge_at == "input"


def untrained(vision: nn.Module, section: dict, seed: int) -> tuple[nn.Module, nn.Module]:
    """(ln_vision, connector) of a model section as training starts with them, in eval mode, on the vision's device.

    Raises ConfigError for a connector that cannot be looked at without training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = build_connector(vision, section)
    if not connector.calibrated():
        raise ConfigError("--before: before training there are no thresholds yet that say how many tokens each picture "
                          "keeps (model.tome_r {average, least, most}); leave it out")  # fmt: skip
    norm = nn.LayerNorm(vision.width)
    if connector.ln_vision_init is not None:
        norm.load_state_dict(connector.ln_vision_init)
    device = next(vision.parameters()).device
    return norm.to(device).eval(), connector.to(device).eval()


def words_of(model, image: Tensor, caption: str) -> list[Word]:
    """What each word of `caption` relies on in the visual prompt of `image` (1, 3, H, W).

    Reliance of word w on token i: |g . x|, g the gradient of log p(w | prompt, words before) with respect to the
    token's embedding x, divided by the sum over tokens. To first order it is how much the word's log-probability
    would change if the token were zero.
    """
    with torch.no_grad():
        prompt = model.visual_prompt(image)
    tokens = prompt.tokens.detach().float().requires_grad_(True)
    pieces, log_probs = model.language_model.token_log_probs(tokens, caption, model.prompt, prompt.mask)
    words = []
    for text, rows in _words(model.language_model.text.tokenizer, pieces):
        log_prob = log_probs[rows].sum()
        gradient = torch.autograd.grad(log_prob, tokens, retain_graph=True)[0]
        reliance = (gradient * tokens).sum(-1)[0].abs().detach().cpu().double().numpy()  # (L',)
        words.append(Word(text, log_prob.item(), reliance / max(reliance.sum(), 1e-30)))
    return words


def _words(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """(word, its positions in `ids`) for each word; pieces that show nothing (the end of the caption) are left out."""
    words, seen = [], []
    for position in range(len(ids)):
        said = tokenizer.decode(ids[: position + 1], skip_special_tokens=True).split()
        if said != seen and said:
            if len(said) > len(words):
                words.append([said[-1], []])
            words[-1][0] = said[-1]
            words[-1][1].append(position)
        seen = said
    return [(text, rows) for text, rows in words]


def shown(image: Tensor, processor) -> np.ndarray:
    """The picture (H, W, 3) in 0..1 that the model sees, from its normalised tensor (3, H, W)."""
    statistics = getattr(processor, "statistics", None)
    if statistics is None:  # LAVIS's
        steps = getattr(getattr(processor, "transform", None), "transforms", [])
        normalize = next((step for step in steps if isinstance(step, transforms.Normalize)), None)
        if normalize is None:
            raise ConfigError(f"{type(processor).__name__} normalises in a way that evlgen tokens cannot take back")
        statistics = (normalize.mean, normalize.std)
    mean, std = (torch.as_tensor(values).view(3, 1, 1) for values in statistics)
    return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()

