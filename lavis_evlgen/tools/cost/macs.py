"""Multiply-adds, parameters and training FLOPs of a config by part, counted without a weight in memory.

Every part runs once on one picture, on tensors that have a shape and no numbers, under torch's FLOP counter: what is
counted is what the code does. One MAC (multiply-add) is two FLOPs. `evlgen macs`; docs/macs.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import nn

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.config.stages import Stage
from lavis_evlgen.models.blip2_stage1 import Blip2Stage1
from lavis_evlgen.models.connectors import TomeFormerConnector
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.language.llm_train import is_adapter
from lavis_evlgen.models.trains import train_as_in
from lavis_evlgen.nn.merging import tokens_after
from lavis_evlgen.reporting import tables
from lavis_evlgen.runners.preflight import check_training
from lavis_evlgen.runners.settings import RunSettings
from lavis_evlgen.tools.cost.counting import (
    FORWARD,
    PASSED,
    TRAINED,
    Cost,
    Part,
    counted,
    flops_of_step,
    without_numbers,
)
from lavis_evlgen.tools.cost.texts import ONE, Texts
from lavis_evlgen.weights.bundle import empty_model

COLUMNS = ("part", "parameters", "", "MACs, linear layers", "MACs, all", "FLOPs of a training step")
ADAPTERS = "LoRA adapters"


def cost_of(model_cfg, text_tokens: int | None = None, stage: Stage | None = None, texts: Texts = ONE) -> Cost:
    """Cost of a model section for one picture and its texts, in a stage; text_tokens: of each (default: max_txt_len).

    Of full-size models only configs and tokenizers are read. Raises ConfigError for an architecture it cannot count.
    """
    cls = registry.get_model_class(model_cfg.arch)
    counted_ones = (EVLGen, Blip2Stage1)
    if cls not in counted_ones:
        known = ", ".join(sorted(n for n, c in registry.mapping["model_name_mapping"].items() if c in counted_ones))
        raise ConfigError(f"model.arch: evlgen macs cannot count {model_cfg.arch}; it counts {known}")
    if cls is Blip2Stage1 and stage is not None and stage.trains is not None:
        raise ConfigError(f"{stage.key}.trains: evlgen macs counts BLIP-2's first stage as a whole, not parts of it")
    model = empty_model(cls, model_cfg)
    train_as_in(model, stage)
    image_size = cls.Settings.read(model_cfg).image_size
    if cls is Blip2Stage1:
        return stage1_cost(model.eval(), image_size, text_tokens or model.max_txt_len)
    cost = evlgen_cost(model.eval(), image_size, text_tokens or model.language_model.max_txt_len, texts)
    if (average := at_average(model_cfg, model)) is None:
        return cost
    return replace(cost, mean=cost_of(average, text_tokens, stage, texts))


def at_average(model_cfg, model: EVLGen):
    """The model section whose pictures all have as many tokens as those of `model` on average, where those differ; None
    where they do not. (Counted as it is, every row is as wide as the longest may be.)"""
    if not model.connector.lengths_differ:
        return None
    return OmegaConf.create({**model_cfg, "tome_r": model.connector.average_merges})


def evlgen_cost(model: EVLGen, image_size: int, text_tokens: int, texts: Texts = ONE) -> Cost:
    """Of an EVLGen on the meta device. Of a text's tokens, the head runs on those that are labels."""
    language = model.language_model
    rows, length, labels = texts.layout(model, text_tokens)
    sizes = _sizes(model)
    head = language.llm.get_output_embeddings()

    def body(prompt):  # (1, L', D_l) -> (rows, L' + T, D_l)
        text = torch.empty(rows, length, language.width)
        return language.body(torch.cat([prompt.expand(rows, -1, -1), text], 1))

    def once(seen, vit, budget):
        """(tokens of the prompt, cost of each part, FLOPs of a step) with `budget` tokens."""
        prompts = texts.count if texts.own_prompts else 1
        seen = seen.expand(prompts, -1, -1)
        question = torch.empty(prompts, language.width) if model.reads_questions else None
        tokens, norm = counted(lambda: model.ln_vision(seen))
        prompt, found = _connector_cost(model.connector, tokens, seen, budget, question)
        keys = prompts * matching_keys(model.connector, tokens.shape[1], budget)
        linear, products = found["connector"]
        found["connector"] = (linear - keys, products + keys)
        found = {"vision encoder": vit, "ln_vision": norm, **found}
        if sizes["gates"][0]:
            found["gates"] = (0, 0)  # a number each
        prompt, found["llm_proj"] = counted(lambda: model.llm_proj(prompt.tokens))
        hidden, found["language model"] = counted(lambda: body(prompt))
        if ADAPTERS in sizes:  # each of their numbers is a product at each position
            own = sizes[ADAPTERS][0] * rows * hidden.shape[1]
            linear, products = found["language model"]
            found |= {"language model": (linear - own, products), ADAPTERS: (own, 0)}
        logits, found["head"] = counted(lambda: head(hidden[:, -labels:]))
        return prompt.shape[1], found, flops_of_step(model, logits.sum(), found)

    draws = model.token_draws()
    with without_numbers(model):
        image = torch.empty(1, 3, image_size, image_size)
        seen, vit = counted(lambda: model.visual_encoder(image))
        at = {budget: once(seen, vit, budget) for budget in {None: 0} | dict.fromkeys(sum(draws, ()))}
    (left, found, step), inference = at[None], {}
    if draws:
        found, step = _mean_of_draws(draws, at)
        inference = {count: sum(map(sum, macs.values())) for count, macs, _ in at.values()}
    return Cost(_parts(sizes, found), image_size, seen.shape[1], left, text_tokens, step, texts.count, draws,
                dict(sorted(inference.items())))  # fmt: skip


def _mean_of_draws(draws: list[tuple[int, ...]], at: dict[int | None, tuple]) -> tuple[dict, int]:
    """(cost of each part, FLOPs of a step): the mean over draws, of which each is a sum but for the ViT's one pass."""
    parts = {name: tuple(round(sum(at[count][1][name][kind] for draw in draws for count in draw) / len(draws))
                         for kind in (0, 1)) for name in at[None][1]}  # fmt: skip
    vit = at[None][1]["vision encoder"]
    again = FORWARD * sum(vit) * (len(draws[0]) - 1)
    steps = [sum(at[count][2] for count in draw) - again for draw in draws]
    return parts | {"vision encoder": vit}, round(sum(steps) / len(draws))


def _connector_cost(connector: nn.Module, tokens: torch.Tensor, features: torch.Tensor, budget, question) -> tuple:
    """(prompt, cost of each part): the layers that belong to `input_proj` apart, on what they are given inside."""
    own = [module for name, module in connector.named_modules() if connector.part_of(f"{name}.weight") == "input_proj"]
    calls = []
    hooks = [module.register_forward_hook(lambda module, given, _: calls.append((module, given)))
             for module in own if isinstance(module, nn.Linear)]  # fmt: skip
    more = {} if budget is None else {"budget": budget}
    prompt, connects = counted(lambda: connector(tokens, question, features=features, **more))
    for hook in hooks:
        hook.remove()
    if not calls:
        return prompt, {"connector": connects}
    projects = counted(lambda: [module(*given) for module, given in calls])[1]
    return prompt, {"input_proj": projects, "connector": tuple(a - b for a, b in zip(connects, projects, strict=True))}


def stage1_cost(model: Blip2Stage1, image_size: int, text_tokens: int) -> Cost:
    """Of BLIP-2's first stage: the four passes that LAVIS's `Blip2Qformer.forward` makes through the Q-Former.

    Matching reads three pairs (right, wrong picture, wrong text); captioning goes on from the first pass's queries.
    """
    sizes, bert, queries = _stage1_sizes(model), model.Qformer.bert, model.query_tokens.shape[1]
    found = {}

    def passes(image):
        def note(name, call):
            result, found[name] = counted(call)
            return result

        words = torch.zeros(1, text_tokens, dtype=torch.long)
        tokens = note("vision encoder", lambda: model.visual_encoder(image))
        tokens = note("ln_vision", lambda: model.ln_vision(tokens))
        read = {"encoder_hidden_states": tokens, "return_dict": True}
        seen = note("pictures", lambda: bert(query_embeds=model.query_tokens, use_cache=True, **read))
        text = note("texts", lambda: bert(words, attention_mask=torch.ones(1, text_tokens), return_dict=True))
        three = {"encoder_hidden_states": tokens.expand(3, -1, -1), "return_dict": True}
        three["attention_mask"] = torch.ones(3, queries + text_tokens)
        pairs = {"query_embeds": model.query_tokens.expand(3, -1, -1), **three}
        match = note("matching, 3 pairs", lambda: bert(words.expand(3, -1), **pairs))
        goes_on = {"attention_mask": torch.ones(1, queries + text_tokens), "past_key_values": seen.past_key_values}
        said = note("captioning", lambda: bert(words, is_decoder=True, return_dict=True, **goes_on))
        logits = note("word head", lambda: model.Qformer.cls(said.last_hidden_state))
        scores = note("contrast and matching heads", lambda: _heads(model, seen, text, match, queries))
        return tokens, logits.sum() + scores

    with without_numbers(model):
        image = torch.empty(1, 3, image_size, image_size)
        tokens, loss = passes(image)
        step = flops_of_step(model, loss, found)
    return Cost(_parts(sizes, found), image_size, tokens.shape[1], queries, text_tokens, step)


def _heads(model, seen, text, match, queries: int):
    """The contrast's and the matching's projections, as one number that has their gradients."""
    pictures, words = model.vision_proj(seen.last_hidden_state), model.text_proj(text.last_hidden_state[:, 0])
    return pictures.sum() + words.sum() + model.itm_head(match.last_hidden_state[:, :queries]).sum()


def matching_keys(connector: nn.Module, tokens: int, budget: int | None = None) -> int:
    """MACs of the keys that a TomeFormer's merging compares: a product with weights that belongs to matching."""
    if not isinstance(connector, TomeFormerConnector):
        return 0
    cfg, macs = connector.tomeformer.cfg, 0
    for n, r in enumerate(cfg.plan(budget)[1]):
        compares = r > 0 if cfg.limits is None else cfg.limits.merges(n) > 0
        macs += compares * tokens * cfg.hidden_size * (cfg.hidden_size // cfg.num_heads)
        tokens = tokens_after(tokens, [r], cfg.protected)
    return macs


def _parts(sizes: dict[str, tuple[int, bool]], found: dict[str, tuple[int, int]]) -> list[Part]:
    """The parts in `found`, in the order in which they run: gradients pass what is frozen behind what trains."""
    parts, passed = [], False
    inside = any(sizes.get(name, (0, False))[1] for name in (ADAPTERS, "soft_prompt"))
    for name, (linear, products) in found.items():
        parameters, trains = sizes.get(name, (0, True))
        passed = passed or trains or (inside and name == "language model")
        factor = TRAINED if trains else PASSED if passed else FORWARD
        parts.append(Part(name, parameters, trains, linear, products, factor))
    return parts


def _sizes(model: EVLGen) -> dict[str, tuple[int, bool]]:
    """(parameters, whether they train) of each part; a head that is the embedding table counts there."""
    head = {id(p) for p in model.language_model.llm.get_output_embeddings().parameters()}
    head -= {id(p) for p in model.language_model.llm.get_input_embeddings().parameters()}
    sizes = dict.fromkeys(("vision encoder", *model.PARTS, "language model", "head"), (0, False))
    for name, parameter in model.named_parameters():
        if name.startswith("visual_encoder."):
            part = "vision encoder"
        elif name.startswith("language_model."):
            part = ADAPTERS if is_adapter(name) else "head" if id(parameter) in head else "language model"
            sizes.setdefault(part, (0, False))
        else:
            part = model.part_of(name)
        sizes[part] = (sizes[part][0] + parameter.numel(), sizes[part][1] or parameter.requires_grad)
    return sizes


def _stage1_sizes(model: Blip2Stage1) -> dict[str, tuple[int, bool]]:
    """(parameters, whether they train); all passes share the Q-Former's, which stand beside the first."""
    count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())  # noqa: E731
    tied = model.Qformer.cls.predictions.decoder.weight is model.Qformer.bert.embeddings.word_embeddings.weight
    head = count(model.Qformer.cls) - tied * model.Qformer.cls.predictions.decoder.weight.numel()
    return {
        "vision encoder": (count(model.visual_encoder), False),
        "ln_vision": (count(model.ln_vision), True),
        "pictures": (count(model.Qformer.bert) + model.query_tokens.numel(), True),
        "word head": (head, True),
        "contrast and matching heads": (count(model.vision_proj, model.text_proj, model.itm_head), True),
    }


def amount(number: float) -> str:
    """11.88G, 6.3M, 512."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def table_rows(cost: Cost) -> list[tuple[str, ...]]:
    """Cells under COLUMNS, the sums last."""
    rows = []
    for part in cost.parts:
        kind = "trains" if part.trains else "frozen"
        formula = f"{part.factor} x {amount(part.macs)} = {amount(part.flops)}"
        rows.append((part.name, amount(part.parameters), kind, amount(part.linear), amount(part.macs), formula))
    trained = sum(part.parameters for part in cost.parts if part.trains)
    sums = [sum(getattr(part, name) for part in cost.parts) for name in ("parameters", "linear", "macs", "flops")]
    whole, linear, macs, flops = map(amount, sums)
    return [*rows, ("sum", whole, f"{amount(trained)} train", linear, macs, flops)]


def as_json(cost: Cost) -> str:
    """All figures, unrounded."""
    parts = [{**asdict(part), "macs": part.macs, "flops": part.flops} for part in cost.parts]
    mean = None if cost.mean is None else json.loads(as_json(cost.mean))
    return json.dumps({**asdict(cost), "parts": parts, "flops": cost.flops, "mean": mean}, indent=2)


def main(args) -> int:
    """Print the table, or JSON."""
    if args.text_tokens is not None and args.text_tokens < 1:
        raise ConfigError(f"--text-tokens {args.text_tokens}: give at least 1")
    cfg = EvlgenConfig(args)
    if not cfg.stages:
        cost = cost_of(cfg.model_cfg, args.text_tokens, texts=Texts.of(cfg))
        if args.json:
            print(as_json(cost))
        else:
            _show(cost)
        return 0
    costs = [(one, cost_of(one.model_cfg, args.text_tokens, one.stage, Texts.of(one))) for one in cfg.stages]
    seen = [_pictures(one) for one in cfg.stages]
    flops = sum(pictures * cost.flops for pictures, (_, cost) in zip(seen, costs, strict=True))
    if args.json:
        stages = [{"name": one.stage.name, "pictures": pictures, **json.loads(as_json(cost))}
                  for pictures, (one, cost) in zip(seen, costs, strict=True)]  # fmt: skip
        print(json.dumps({"stages": stages, "pictures": sum(seen), "flops": flops}, indent=2))
        return 0
    for pictures, (one, cost) in zip(seen, costs, strict=True):
        print(f"{one.stage.label}: {pictures} pictures of one process, {amount(pictures * cost.flops)}FLOPs")
        _show(cost)
    print(f"all stages: {sum(seen)} pictures of one process, {amount(flops)}FLOPs")
    return 0


def _pictures(cfg: EvlgenConfig) -> int:
    """Pictures that one process trains on in a run."""
    run = RunSettings.read(cfg.run_cfg, "run.")
    check_training(cfg.run_cfg, RunSettings.meanings())
    return run.max_iters * run.batch_size_train * run.accum_grad_iters


def _show(cost: Cost):
    times = f"{cost.texts} texts of " if cost.texts > 1 else ""
    unit = " each" if times else ""
    print(f"one picture of {cost.image_size} x {cost.image_size}: {cost.visual_tokens} visual tokens, "
          f"{cost.prompt_tokens} after the connector, {times}{cost.text_tokens} text tokens{unit}")  # fmt: skip
    print(tables.show(COLUMNS, table_rows(cost), left=("part", "")))
    off = cost.flops / cost.step_flops - 1
    print(f"a training step on it, counted forward and backward: {amount(cost.step_flops)}FLOPs "
          f"(the formula's sum is {off:+.1%} of that)")  # fmt: skip
    if cost.mean is not None:
        print(f"that is with {cost.prompt_tokens} tokens, to which all pictures are padded; with the "
              f"{cost.mean.prompt_tokens} of the mean picture: {amount(cost.mean.macs)} MACs (padded: "
              f"{amount(cost.macs)}), {amount(cost.mean.step_flops)}FLOPs a step")  # fmt: skip
    if cost.texts > 1:
        print(f"of each of the {cost.texts} texts: {amount(cost.step_flops / cost.texts)}FLOPs")
    if cost.drawn:
        each = ", ".join(f"{count}: {amount(macs)}" for count, macs in cost.inference.items())
        print(f"all of this is the mean over what training draws: {', '.join(map(listed, cost.drawn))} tokens; MACs of "
              f"one pass with so many tokens: {each}")  # fmt: skip


def listed(draw: tuple[int, ...]) -> str:
    """The numbers of visual tokens of one micro-step, in words."""
    return " + ".join(map(str, draw))
