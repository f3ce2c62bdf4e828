"""What LAVIS 1.0.2 takes from transformers, and transformers 5 has no longer: written anew, with the same results.

`lavis_bridge` puts these where LAVIS looks for them. Of the functions, LAVIS calls those in `prune_heads` of its BERTs
and in `parallelize` of its T5, which nothing here uses; but without the names `import lavis` fails. The methods are of
`PreTrainedModel`, and LAVIS's own BERTs call them.
"""

from collections.abc import Callable, Sequence
from math import ceil

import torch
import transformers
from torch import Tensor, nn


def find_pruneable_heads_and_indices(
    heads: Sequence[int], n_heads: int, head_size: int, already_pruned_heads: set[int]
) -> tuple[set[int], Tensor]:
    """(heads still to be pruned, indices (n,) of the weights' rows that stay).

    heads count as in the whole layer; the rows are those of the n_heads that are left after `already_pruned_heads`.
    """
    heads = set(heads) - already_pruned_heads
    stays = torch.ones(n_heads, head_size, dtype=torch.bool)
    for head in heads:
        stays[head - sum(pruned < head for pruned in already_pruned_heads)] = False
    return heads, stays.flatten().nonzero().flatten()


def get_device_map(n_layers: int, devices: Sequence) -> dict:
    """Device -> its share of the layers, in order."""
    share = ceil(n_layers / len(devices))
    return {device: list(range(n * share, min((n + 1) * share, n_layers))) for n, device in enumerate(devices)}


def assert_device_map(device_map: dict, num_blocks: int) -> None:
    """Raise ValueError unless every layer is on exactly one device."""
    layers = sorted(layer for on_device in device_map.values() for layer in on_device)
    if layers != list(range(num_blocks)):
        raise ValueError(f"device_map has the layers {layers}; each of 0 to {num_blocks - 1} has to be there once")


def get_head_mask(self, head_mask: Tensor | None, num_hidden_layers: int, is_attention_chunked: bool = False):
    """A mask (heads,) or (layers, heads) of ones for heads that stay -> (layers, 1, heads, 1, 1); None: all stay."""
    if head_mask is None:
        return [None] * num_hidden_layers
    if head_mask.dim() == 1:
        head_mask = head_mask.expand(num_hidden_layers, -1)
    head_mask = head_mask[:, None, :, None, None].to(self.dtype)  # (layers, heads) -> (layers, 1, heads, 1, 1)
    return head_mask.unsqueeze(-1) if is_attention_chunked else head_mask


def invert_attention_mask(self, encoder_attention_mask: Tensor) -> Tensor:
    """A mask (B, L) or (B, T, L) of ones for what is attended to -> what is added to (B, heads, T, L) scores."""
    mask = encoder_attention_mask.to(self.dtype)
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]  # (B, 1, 1 or T, L)
    return (1.0 - mask) * torch.finfo(self.dtype).min


def init_weights(self) -> None:
    """Of a model that calls this at the end of its constructor, where transformers 5 wants `post_init()` called."""
    if "all_tied_weights_keys" in vars(self):
        transformers.PreTrainedModel.init_weights(self)
    else:
        self.post_init()  # which calls this again


def tie_weights(self, *args, **kwargs) -> None:
    """Of LAVIS's BERTs, whose word head has one bias by two names: transformers 5 loads them as two."""
    transformers.PreTrainedModel.tie_weights(self, *args, **kwargs)
    if (head := getattr(self, "cls", None)) is not None:
        predictions = head.predictions
        if predictions.decoder.bias.shape == predictions.bias.shape:  # not after resize_token_embeddings
            predictions.decoder.bias = predictions.bias


def with_what_no_file_holds(init_weights_of: Callable) -> Callable:
    """`_init_weights` of LAVIS's BERTs, which also fills `position_ids` and the bias of the word head.

    transformers 5 builds a model that it loads without memory, and what is in no file is then left undefined.
    """

    def _init_weights(self, module: nn.Module):
        init_weights_of(self, module)
        if (positions := module._buffers.get("position_ids")) is not None:  # (1, most positions)
            positions.copy_(torch.arange(positions.shape[1]))
        if type(module).__name__ == "BertLMPredictionHead":
            module.bias.data.zero_()

    return _init_weights
