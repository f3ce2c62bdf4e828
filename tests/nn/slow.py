"""Token merging and TomeFormer once more, token by token in plain loops: what the fast code is held against.

Written from the description of the released model (even positions are A, odd ones B; every A token points at
its most similar B token; the r strongest are averaged into it; order: unmerged A, then B), not from our code.
"""

import math

import torch


def slow_groups(keys, r, protected):
    """keys (T, C) -> the groups of old positions, in the new order."""
    tokens = len(keys)
    set_a, set_b = list(range(protected)), []
    to_b = protected > 0  # [CLS] at position 0 is in A, so position 1 is in B
    for position in range(protected, tokens):
        (set_b if to_b else set_a).append(position)
        to_b = not to_b
    pointers = []
    for a in set_a[protected:]:
        best, best_similarity = None, -math.inf
        for b in set_b:
            dot = sum(x * y for x, y in zip(keys[a].tolist(), keys[b].tolist(), strict=True))
            similarity = dot / (keys[a].norm().item() * keys[b].norm().item())
            if similarity > best_similarity:
                best, best_similarity = b, similarity
        pointers.append((best_similarity, a, best))
    pointers.sort(reverse=True)
    target = {a: b for _, a, b in pointers[: min(r, (tokens - protected) // 2)]}
    groups = [[a] for a in set_a if a not in target]
    for b in set_b:
        groups.append([b] + [a for a in sorted(target) if target[a] == b])
    return groups


def slow_mean(x, groups, sizes=None):
    """x (T, D) -> (T', D): the mean of each group, weighted by `sizes` (a list) where given."""
    rows = []
    for group in groups:
        weights = [1.0 if sizes is None else sizes[i] for i in group]
        rows.append(sum(w * x[i] for w, i in zip(weights, group, strict=True)) / sum(weights))
    return torch.stack(rows)


def slow_slot(groups):
    """The map old position -> new position that the groups stand for."""
    slot = {old: new for new, group in enumerate(groups) for old in group}
    return [slot[old] for old in range(len(slot))]


def _norm(x, weight, bias, eps=1e-12):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def slow_tomeformer(state, x, heads, schedule, protected=1, merge_mean="plain", proportional=False, sizes=None):
    """One picture, x (T, D), through a TomeFormer with weights `state` -> (T', D), patches of each token.

    sizes: how many patches each of the T tokens stands for, 1 where not given.
    """

    def linear(name, y):
        return y @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(name, y):
        return _norm(y, state[name + ".weight"], state[name + ".bias"])

    tokens, width = x.shape
    x = x + state["embeddings.position_embeddings.weight"][:tokens]
    x = norm("embeddings.LayerNorm", x + state["embeddings.token_type_embeddings.weight"][0])
    patches = [[i] * n for i, n in enumerate(sizes or [1] * tokens)]
    for number, r in enumerate(schedule):
        layer = f"encoder.layer.{number}."
        query, key, value = (linear(f"{layer}attention.self.{n}", x) for n in ("query", "key", "value"))
        wide, mixed, metric = width // heads, [], 0
        for head in range(heads):
            part = slice(head * wide, (head + 1) * wide)
            logits = query[:, part] @ key[:, part].T / math.sqrt(wide)
            if proportional:
                logits = logits + torch.tensor([math.log(len(p)) for p in patches], dtype=x.dtype)
            weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
            mixed.append(weights @ value[:, part])
            metric = metric + key[:, part] / heads
        attended = linear(layer + "attention.output.dense", torch.cat(mixed, -1))
        x = norm(layer + "attention.output.LayerNorm", attended + x)
        if r:
            groups = slow_groups(metric, r, protected)
            x = slow_mean(x, groups, [len(p) for p in patches] if merge_mean == "size" else None)
            patches = [sum((patches[i] for i in group), []) for group in groups]
        hidden = linear(layer + "intermediate.dense", x)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = norm(layer + "output.LayerNorm", linear(layer + "output.dense", hidden) + x)
    return x, patches
