"""What each benchmark's results say as a table of docs/performance.md."""

from __future__ import annotations

from lavis_evlgen.reporting.tables import markdown

PHASES = ("vision encoder", "connector, forward", "language model, forward", "head and loss, both passes",
          "language model, backward", "connector, backward", "optimizer")  # fmt: skip


def milliseconds(time: dict) -> str:
    """Median, and the quartiles behind it: 12.3 (12.1 to 12.9)."""
    median, low, high = (f"{1e3 * time[key]:.3g}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def ratio(times: dict, name: str, base: str) -> str:
    """How many times as long `name` takes as `base`."""
    return f"{times[name]['median'] / times[base]['median']:.2f}x"


def merge_table(card: dict) -> str:
    """Each formulation's time, and how long the others take against ours."""
    columns = ["tokens", "precision", "passes", "product, ms", "scatter_add", "index_add", "largest error: product",
               "scatter_add"]  # fmt: skip
    rows = []
    for row in card["rows"]:
        times, errors = row["seconds"], row["largest_error"]
        others = [ratio(times, name, "product") for name in ("scatter_add", "index_add")]
        cells = [f"{row['tokens']} -> {row['slots']}", row["dtype"], row["passes"], milliseconds(times["product"])]
        rows.append([*cells, *others, *(f"{errors[name]:.1g}" for name in ("product", "scatter_add"))])
    return markdown(columns, rows)


def connector_table(card: dict) -> str:
    """One row a connector: MACs, times, and how long it takes against the paper's TomeFormer."""
    by_passes = {row["passes"]: row for row in card["rows"]}
    forward, both = by_passes["forward"], by_passes["forward+backward"]
    rows = []
    for name, macs in sorted(forward["macs"].items(), key=lambda item: not item[0].startswith("TomeFormer")):
        cells = [name, f"{macs['all'] / 1e9:.2f}G"]
        for row in (forward, both):
            times = row["seconds"]
            cells += [milliseconds(times[name]), ratio(times, name, "TomeFormer-12")]
        rows.append(cells)
    columns = ["connector", "MACs a picture", "forward, ms", "of TomeFormer-12", "forward+backward, ms",
               "of TomeFormer-12"]  # fmt: skip
    return markdown(columns, rows) + f"\n\nBatches of {forward['batch']}, {forward['dtype']}."


def data_table(card: dict) -> str:
    """Pictures a second of each pipeline, and how many times that of LAVIS's processor with the same steps."""
    same_steps = "LAVIS, blip2_image_train"
    names = sorted(card["rows"][0]["seconds"], key=lambda name: name.startswith("LAVIS"))
    rows = []
    for row in card["rows"]:
        cells = [row["kind"], f"{row['picture']}, {row['bytes'] // 1000} kB"]
        for name in names:
            rate = f"{row['timed'] / row['seconds'][name]['median']:.0f}"
            cells.append(rate if name == same_steps else f"{rate} ({ratio(row['seconds'], same_steps, name)})")
        rows.append(cells)
    return markdown(["from", "pictures", *names], rows)


def step_table(card: dict) -> str:
    """The whole step, its phases, the step with one saving undone at a time, and the head alone."""
    row = card["rows"][0]
    whole, phases, head = row["seconds"]["whole"], row["phases"], row["head_and_loss"]
    sum_of_phases = sum(time["median"] for time in phases.values())
    compiled = [f"compiled: {' and '.join(row['compile'])}"] if row["compile"] else []
    told = [f"batch {row['batch']}", f"{row['dtype']}, frozen parts {row['frozen']}", *compiled,
            f"{row['images_per_s']:.3g} images/s", f"{milliseconds(whole)} ms a step"]  # fmt: skip
    told += [] if row["mfu"] is None else [f"MFU {row['mfu']:.0%}"]
    peak = "peak" if card["machine"]["device"] == "cuda" else "beside weights and moments"
    told.append(f"{peak} {row['memory_gb']['whole']:.2f} GB")
    if data := row["with_data"]:
        told.append(f"{data['waited'] / data['seconds']:.0%} of the time waiting for {data['workers']} data processes")
    shares = [[name, milliseconds(time), f"{time['median'] / sum_of_phases:.0%}"] for name, time in
              sorted(phases.items(), key=lambda item: PHASES.index(item[0]))]  # fmt: skip
    undone = [undone_cells(row, name) for name in row["memory_gb"] if name != "whole"]
    alone = [f"{head['rows_of_logits'][name]} rows of logits, {milliseconds(time)} ms" for name, time in
             head["seconds"].items()]  # fmt: skip
    held = head["held_gb"]
    saved = f"; they hold {held['supervised']:.3f} against {held['full']:.3f} GB ("
    saved += f"{held['supervised'] / held['full']:.2f}x)"
    parts = [f"`{row['scale']}`: {', '.join(told)}.", markdown(["phase", "ms", "share"], shares)]
    if undone:
        columns = ["changed", "time of a step: by FLOPs", "measured", "memory", "loss differs by"]
        parts.append(markdown(columns, undone))
    less = head["seconds"]["supervised"]["median"] / head["seconds"]["full"]["median"]
    parts.append(f"Head and loss alone: {alone[0]}, against {alone[1]} ({less:.2f}x){saved}.")
    return "\n\n".join(parts)


def undone_cells(row: dict, name: str) -> list[str]:
    """What a step without one saving takes, against the whole: by its FLOPs, and as it was measured."""
    predicted = f"{row['flops'][name] / row['flops']['whole']:.2f}x"
    slower = ratio(row["seconds"], name, "whole") if name in row["seconds"] else "-"
    memory = row["memory_gb"][name]
    told = memory if isinstance(memory, str) else f"{memory:.2f} GB"
    return [f"`--{name}`", predicted, slower, told, f"{row['loss_differences'][name]:.0e}"]


def generate_table(card: dict) -> str:
    """Captions a second by batch size and search, and the time before the first word."""
    rows = []
    for row in card["rows"]:
        times = row["seconds"]
        cells = [f"{row['captions_per_s'][name]:.3g} ({milliseconds(times[name])} ms)" for name in ("greedy", "beam 5")]
        rows.append([str(row["batch"]), *cells, milliseconds(times["visual prompt"])])
    row = card["rows"][0]
    columns = ["batch", "greedy, captions/s", "beam 5, captions/s", "visual prompt, ms"]
    return f"`{row['scale']}`, {row['dtype']}, {row['tokens']} new tokens each.\n\n" + markdown(columns, rows)


def caption_many_table(card: dict) -> str:
    """Pictures a second from files to captions, by batch size and data workers, against one after another."""
    rows = []
    for row in card["rows"]:
        times, rates = row["seconds"], row["pictures_per_s"]
        one, many = rates
        rows.append([
            str(row["batch"]), str(row["workers"]), f"{rates[one]:.3g}", f"{rates[many]:.3g}",
            ratio(times, many, one), f"{row['same']} of {row['pictures']}",
        ])  # fmt: skip
    row = card["rows"][0]
    columns = ["batch", "workers", "one by one, pictures/s", "in batches, pictures/s", "batches take", "same captions"]
    words = f"`{row['scale']}`, {row['dtype']}, {row['tokens']} new tokens each, {row['beams']} beams."
    return f"{words}\n\n" + markdown(columns, rows)


def vision_table(card: dict) -> str:
    """LAVIS's attention against the fused one: time, what a pass holds, and how far the results are apart."""
    rows = []
    for row in card["rows"]:
        seconds, held = row["seconds"], row["held_gb"]
        rows.append([
            row["dtype"], row["passes"], milliseconds(seconds["LAVIS"]), milliseconds(seconds["fused"]),
            ratio(seconds, "fused", "LAVIS"), f"{held['LAVIS']:.3f}", f"{held['fused']:.3f}",
            f"{row['difference']:.1g}",
        ])  # fmt: skip
    columns = ["precision", "passes", "LAVIS, ms", "fused, ms", "fused takes", "LAVIS holds, GB", "fused holds, GB",
               "difference"]  # fmt: skip
    row = card["rows"][0]
    return f"{row['blocks']} of 39 blocks, batches of {row['batch']}.\n\n" + markdown(columns, rows)


def lengths_table(card: dict) -> str:
    """Either way to compile for captions of every length, against the same steps not compiled."""
    rows = []
    for row in card["rows"]:
        seconds, flops = row["seconds"], row["flops"]
        rows.append([
            row["way"], str(row["graphs"]), f"{row['first_pass_seconds']:.0f}",
            *(milliseconds({key: time[key] / row["steps"] for key in ("median", "low", "high")})
              for time in (seconds["not compiled"], seconds["compiled"])),
            f"{flops['compiled'] / flops['not compiled']:.2f}x", ratio(seconds, "compiled", "not compiled"),
            f"{row['loss_difference']:.0e}",
        ])  # fmt: skip
    columns = ["language model", "compilations", "first pass, s", "a step not compiled, ms", "compiled, ms",
               "time of a step: by FLOPs", "measured", "loss differs by"]  # fmt: skip
    row, (least, most) = card["rows"][0], card["settings"]["tokens"]
    told = f"`{row['scale']}`, batch {row['batch']}, {row['dtype']}, captions of {least} to {most} tokens.\n\n"
    return told + markdown(columns, rows)


def blip2_table(card: dict) -> str:
    """A step of EVLGen and of either stage of BLIP-2: time, pictures a second, and against EVLGen's."""
    rows = []
    for row in card["rows"]:
        for name, time in row["seconds"].items():
            memory = row["memory_gb"][name]
            rows.append([
                name, f"{row['trains'][name] / 1e6:.1f}M", milliseconds(time), f"{row['batch'] / time['median']:.3g}",
                ratio(row["seconds"], name, "EVLGen"), "-" if memory is None else f"{memory:.2f}",
            ])  # fmt: skip
    columns = ["step of", "trains", "ms", "pictures/s", "of EVLGen's", "peak memory, GB"]
    row = card["rows"][0]
    return f"`{row['scale']}`, batch {row['batch']}, {row['dtype']}.\n\n" + markdown(columns, rows)


def cached_table(card: dict) -> str:
    """A step with the ViT and one from stored tokens: time, by its FLOPs and measured, and what reading them takes."""
    rows, base = [], "with the ViT"
    for row in card["rows"]:
        for name, time in row["seconds"].items():
            if name not in row["flops"]:
                continue
            memory = row["memory_gb"][name]
            rows.append([
                name, milliseconds(time), f"{row['batch'] / time['median']:.3g}",
                f"{row['flops'][name] / row['flops'][base]:.2f}x", ratio(row["seconds"], name, base),
                "-" if memory is None else f"{memory:.2f}",
            ])  # fmt: skip
    columns = ["step", "ms", "pictures/s", "time of a step: by FLOPs", "measured", "peak memory, GB"]
    row = card["rows"][0]
    read = milliseconds(row["seconds"]["reading tokens"])
    told = f"Tokens of a picture: {row['bytes_a_picture'] / 1e6:.2f} MB; reading a batch of them takes {read} ms."
    return f"`{row['scale']}`, batch {row['batch']}, {row['dtype']}.\n\n{markdown(columns, rows)}\n\n{told}"


def packing_table(card: dict) -> str:
    """The step by its number of texts a picture, and SCST's with and without sharing the prompt."""
    settings, rows = card["settings"], [row for row in card["rows"] if row["part"] == "training"]
    parts = {"vision encoder": ("vision",), "connector": ("connector",), "language model": ("language", "head")}
    cells = []
    for row in rows:
        spent = [1e3 * sum(time["median"] for name, time in row["phases"].items() if name.startswith(starts))
                 for starts in parts.values()]  # fmt: skip
        cells.append([
            str(row["texts"]), milliseconds(row["seconds"]), *(f"{ms:.3g}" for ms in spent),
            f"{row['texts_per_s']:.3g}", f"{row['texts_per_s'] / rows[0]['texts_per_s']:.2f}x",
            f"{row['loss_difference']:.0e}",
        ])  # fmt: skip
    columns = ["texts a picture", "step, ms", *(f"{name}, ms" for name in parts), "texts/s",
               f"of {rows[0]['texts']}'s", "loss differs by"]  # fmt: skip
    (scst,) = (row for row in card["rows"] if row["part"] == "scst")
    shared = []
    for name in ("step", "drawing"):
        ways = [f"{name}, {how}" for how in SCST_PROMPTS]
        shared.append([name, *(milliseconds(scst["seconds"][way]) for way in ways), ratio(scst["seconds"], *ways)])
    told = f"`{settings['scale']}`, batch {settings['batch']}, {settings['dtype']}."
    drawn = (
        f"SCST, {settings['samples']} captions of {settings['tokens']} tokens drawn for a picture, scoring not "
        f"counted; {scst['same_draws']:.0%} of them the same either way:"
    )
    columns_of_scst = ["", *(f"{how}, ms" for how in SCST_PROMPTS), "takes"]
    return "\n\n".join([told, markdown(columns, cells), drawn, markdown(columns_of_scst, shared)])


SCST_PROMPTS = ("one prompt for all", "a prompt for each")  # names of ways in the results of speed/packing.py


def told(value: float | str, form: str = ".2%") -> str:
    """A figure, or the word (nan, inf) that a results file has in its place."""
    return value if isinstance(value, str) else format(value, form)


def numerics_table(card: dict) -> str:
    """Loss, merged pairs and gradients of half precision against float32."""
    parts = list(card["rows"][0]["gradient_differences"])
    rows = [
        [
            row["dtype"], *(told(row[key], ".4f") for key in ("loss", "loss_fp32")), told(row["loss_difference"]),
            told(row["pairs_that_agree"]), *(told(row["gradient_differences"][part]) for part in parts),
        ]
        for row in card["rows"]
    ]  # fmt: skip
    columns = ["precision", "loss", "in float32", "differs by", "pairs merged by both",
               *(f"gradient of {part} differs by" for part in parts)]  # fmt: skip
    settings = card["settings"]
    return f"`{settings['scale']}`, batch {settings['batch']}.\n\n" + markdown(columns, rows)


def ranks_table(card: dict) -> str:
    """A step on one GPU and on several beside each other."""
    rows = []
    for row in card["rows"]:
        seconds = row["seconds"]
        rows.append([
            str(row["ranks"]), milliseconds(seconds["alone"]), milliseconds(seconds["together"]),
            f"{row['images_per_s']['together']:.3g}", ratio(seconds, "together", "alone"),
            f"{row['loss_difference']:.0e}",
        ])  # fmt: skip
    columns = ["ranks", "a step alone, ms", "in DDP, ms", "pictures/s of all", "takes", "loss differs by"]
    row = card["rows"][0]
    return f"`{row['scale']}`, batch {row['batch']} on each, {row['dtype']}.\n\n" + markdown(columns, rows)


AXES = {"batch": "pictures a batch", "text": "tokens of a caption", "tokens_left": "visual tokens left",
        "frames": "frames of a clip"}  # fmt: skip


def scaling_table(card: dict) -> str:
    """A step against each of its sizes: its time, a picture's, the rate that comes of it, and memory."""
    settings, rows = card["settings"], []
    for row in card["rows"]:
        seconds, measured = row["seconds"]["median"], row["measured_gb"]
        rate = row["flops"] * row["batch"] / seconds
        rows.append([
            AXES[row["axis"]], str(row["value"]), str(row["batch"]), milliseconds(row["seconds"]),
            f"{1e3 * seconds / row['batch']:.3g}", f"{row['flops'] / 1e9:.3g}", f"{rate / 1e9:,.0f}",
            f"{row['working_gb']:.2f}", "-" if measured is None else f"{measured:.2f}",
        ])  # fmt: skip
    columns = ["what changes", "to", "batch", "step, ms", "each, ms", "GFLOPs each", "GFLOPs a second",
               "working memory, GB: counted", "measured"]  # fmt: skip
    return f"`{settings['scale']}`, {settings['dtype']}.\n\n" + markdown(columns, rows)


def floor_table(card: dict) -> str:
    """What each part of a step cannot go below: by operations, by bytes of products, by bytes of all operations."""
    tables = []
    for row in card["rows"]:
        sums, lines = [0.0, 0.0], []
        for part in PHASES:
            found = row["parts"][part]
            by_flops = found["flops"] / card["peak"]
            fused, alone = (found[key] / card["bandwidth"] for key in ("products", "all"))
            sums = [sums[0] + max(by_flops, fused), sums[1] + max(by_flops, alone)]
            lines.append([part, f"{found['flops'] / 1e12:.1f}", *(f"{1e3 * s:.1f}" for s in (by_flops, fused, alone))])
        rates = [f"{1e3 * seconds:.0f} ms, {row['batch'] / seconds:.0f} pictures/s" for seconds in sums]
        columns = ["part", "TFLOPs", "operations, ms", "bytes of products, ms", "bytes of all operations, ms"]
        tables.append(
            f"`{row['scale']}`, batch {row['batch']}, {row['text']} tokens of text: no less than {rates[0]} if all but "
            f"products were fused into them, {rates[1]} if nothing is.\n\n{markdown(columns, lines)}"
        )
    peak, bandwidth = f"{card['peak'] / 1e12:.0f} TFLOPs", f"{card['bandwidth'] / 1e12:g} TB"
    return "\n\n".join([f"At {peak} and {bandwidth} a second ({card['gpu']}, data sheet).", *tables])


TABLES = {
    "merge": merge_table, "connector": connector_table, "data": data_table, "vision": vision_table, "step": step_table,
    "lengths": lengths_table, "packing": packing_table, "blip2": blip2_table, "scaling": scaling_table,
    "generate": generate_table, "caption_many": caption_many_table, "cached_features": cached_table,
    "numerics": numerics_table, "ranks": ranks_table,
}  # fmt: skip
