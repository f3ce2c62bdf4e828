"""The page: what a visitor sets goes to `describe`, what it finds comes back. Gradio, and nothing from another host."""

from __future__ import annotations

import atexit
import functools
import html
import logging
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock

os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"  # read where gradio is imported

import gradio as gr
import torch
from starlette.middleware import Middleware

from lavis_evlgen.config import ConfigError
from lavis_evlgen.demo.describing import (
    MOST_BEAMS,
    MOST_LENGTH,
    MOST_LETTERS,
    Refused,
    Settings,
    describe,
    facts,
    largest_r,
    tokens_picture,
    tokens_range,
)
from lavis_evlgen.demo.examples import drawn_scenes, from_folder, thumbnails
from lavis_evlgen.demo.own_requests import OwnRequestsOnly
from lavis_evlgen.demo.uploads import Limits, preview, read
from lavis_evlgen.media.video import takes_clips
from lavis_evlgen.tools.tokens import STYLES

QUEUE = 100  # requests that may wait; later ones are refused
ANSWER_LENGTH = 10  # evlgen_vqa's
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


@dataclass
class Visitors:
    """The model that visitors share, one at a time: some of its modules hold state during a call."""

    model: torch.nn.Module
    processor: object
    decoding: dict
    device: torch.device
    limits: Limits = field(default_factory=Limits)
    lock: Lock = field(default_factory=Lock)

    def look(self, path: str | None, settings: Settings, style: str):
        """(text, facts in Markdown, picture of the merged tokens). Raises Refused."""
        if path is None:
            raise Refused("give a picture or a clip first: upload one, or pick one below")
        with self.lock:
            image = read(path, self.processor, self.limits).to(self.device)
            try:
                found = describe(self.model, image, settings)
            except torch.cuda.OutOfMemoryError:
                raise Refused("not enough memory on the GPU for this: fewer beams, or a larger r") from None
            protected = self.model.visual_encoder.protected
            drawing, note = tokens_picture(found, image, self.processor, protected, style)
        return found.text, facts(found) + (f"  \n{note}" if note else ""), drawing


def start(visitors: Visitors, host: str, port: int, pictures: Path | None = None, block: bool = True):
    """Serve the page until interrupted; block=False: come back at once with (page, address), `page.close()` ends it.

    pictures: folder of files to pick from; None: drawn scenes. Raises ConfigError where host or port cannot be had.
    """
    if block:
        end_on_signals()
    chosen = Path(mkdtemp(prefix="examples_", dir=_uploads()))
    try:
        examples = drawn_scenes(chosen, visitors.processor) if pictures is None else from_folder(
            pictures, chosen, visitors.processor, visitors.limits
        )  # fmt: skip
    except Refused as error:
        raise ConfigError(str(error)) from None
    page = build(visitors, examples)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks its own server whether it is up
    try:
        _, address, _ = page.queue(max_size=QUEUE, default_concurrency_limit=1).launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False,
            max_file_size=int(visitors.limits.megabytes * 1e6), theme=gr.themes.Base(**FONTS), footer_links=[],
            enable_monitoring=False, mcp_server=False, pwa=False,
            app_kwargs={"middleware": [Middleware(OwnRequestsOnly, host=host)]},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot serve there, the port is taken or the host is not this machine's; "
            f"give another --port ({str(error).partition('. ')[0]})"
        ) from None
    if not block:
        return page, address
    print(f"evlgen demo: {address}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return page, address


def end_on_signals():
    """SIGTERM and SIGHUP end the process as Ctrl-C does: it removes the uploads at its end."""
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, frame: sys.exit(128 + number))


@functools.cache
def _uploads() -> str:
    """The folder of this process's uploads and of what can be picked; it goes when the process ends."""
    folder = mkdtemp(prefix="evlgen_demo_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder
    return folder


def build(visitors: Visitors, examples: list[Path]) -> gr.Blocks:
    """The Blocks of the page."""
    model, limits = visitors.model, visitors.limits
    first = {"num_beams": 5, "min_length": 1, "max_length": 30, **visitors.decoding}
    beam, low, high = (
        min(first[key], largest)
        for key, largest in (("num_beams", MOST_BEAMS), ("min_length", MOST_LENGTH), ("max_length", MOST_LENGTH))
    )
    most, reachable = largest_r(model), tokens_range(model) or (0, 0)
    thing = "clip or picture" if takes_clips(visitors.processor) else "picture"

    def asked(path, trained, r, prompt, beams, shortest, longest, style, question=None, answer_length=None, tokens=0):
        merging = {} if trained or most is None else {"r": r, "tokens": tokens or None}
        chosen = {**merging, "prompt": prompt, "num_beams": beams}
        chosen |= {"min_length": shortest, "max_length": longest, "more": visitors.decoding}
        if question is not None:
            chosen |= {"question": question, "min_length": 1, "max_length": answer_length}
        return shown_errors(lambda: visitors.look(path, Settings(**chosen), style))

    def captioned(path, trained, r, prompt, beams, shortest, longest, style, tokens):
        return asked(path, trained, r, prompt, beams, shortest, longest, style, tokens=tokens)

    def shown_errors(work):
        try:
            return work()
        except Refused as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None

    def seen(path):
        return None if path is None else shown_errors(lambda: preview(path, limits))

    def pick(event: gr.SelectData):
        return str(examples[event.index])

    with gr.Blocks(title="EVLGen", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"## EVLGen\nWhat the model says about a {thing}, and the visual tokens that it says it from.")
        with gr.Row():
            with gr.Column():
                file = gr.File(label=f"a {thing}, at most {limits.megabytes:g} MB", elem_id="file")
                look = gr.Image(label="yours", interactive=False, height=260, elem_id="preview", buttons=[])
                if examples:
                    gallery = gr.Gallery(
                        thumbnails(examples, limits), label="or pick one", columns=6, height=140, allow_preview=False,
                        object_fit="contain", elem_id="examples", buttons=[], interactive=False,
                    )  # fmt: skip
                    gallery.select(pick, None, file, api_visibility="private", queue=False)
                prompt = gr.Textbox(model.prompt, label="the caption begins with", max_length=MOST_LETTERS)
                with gr.Accordion("merging and decoding", open=True):
                    trained = gr.Checkbox(True, label=_trained(model), visible=most is not None, elem_id="trained")
                    r = gr.Slider(
                        0, most or 0, _first_r(model), step=1, label="r: merges in every layer", elem_id="r",
                        visible=most is not None, interactive=False,
                    )  # fmt: skip
                    left = gr.Slider(
                        0, reachable[1], 0, step=1, elem_id="left", visible=most is not None, interactive=False,
                        label=f"tokens left, {reachable[0]} to {reachable[1]} (0: as r leaves)",
                    )  # fmt: skip
                    trained.change(
                        lambda on: [gr.update(interactive=not on)] * 2, trained, [r, left], api_visibility="private",
                        queue=False,
                    )  # fmt: skip
                    with gr.Row():
                        beams = gr.Slider(1, MOST_BEAMS, beam, step=1, label="beams (1: greedy)")
                        shortest = gr.Slider(0, MOST_LENGTH, low, step=1, label="shortest, tokens")
                        longest = gr.Slider(1, MOST_LENGTH, high, step=1, label="longest, tokens")
                    style = gr.Radio(list(STYLES), value="outline", label="tokens drawn as")
            with gr.Column():
                say = gr.Button("Caption", variant="primary", elem_id="say")
                with gr.Row():
                    question = gr.Textbox(
                        label="question", placeholder="What colour is the square?", max_length=MOST_LETTERS,
                        elem_id="question", scale=3,
                    )  # fmt: skip
                    length = gr.Slider(1, MOST_LENGTH, ANSWER_LENGTH, step=1, label="answer, tokens", scale=2)
                ask = gr.Button("Ask", elem_id="ask")
                text = gr.Textbox(label="what it says", elem_id="text", interactive=False, buttons=["copy"])
                numbers = gr.Markdown(elem_id="facts")
                tokens = gr.Image(label="the tokens of the prompt", interactive=False, elem_id="tokens")
        settings, found = [file, trained, r, prompt, beams, shortest, longest, style], [text, numbers, tokens]
        file.change(seen, file, look, api_visibility="private")
        say.click(captioned, [*settings, left], found, api_name="caption")
        gr.on([ask.click, question.submit], asked, [*settings, question, length, left], found, api_name="answer")
    return page


def _trained(model) -> str:
    """How the model was trained to merge, in words."""
    if largest_r(model) is None:
        return ""
    cfg = model.connector.tomeformer.cfg
    if cfg.limits is not None:
        return f"merge as trained ({cfg.num_tokens} → {cfg.limits.least[-1]} to {cfg.num_output_tokens} tokens)"
    schedule = cfg.folds or cfg.schedule
    merges = sorted(set(schedule))
    each = f"r = {merges[0]}" if len(merges) == 1 else f"r = {', '.join(map(str, schedule))}"
    return f"merge as trained ({each}: {cfg.num_tokens} → {cfg.num_output_tokens} tokens)"


def _first_r(model) -> int:
    """Where the slider stands at first: the schedule's mean."""
    most = largest_r(model)
    if most is None:
        return 0
    cfg = model.connector.tomeformer.cfg
    return min(round(sum(cfg.folds or cfg.schedule) / cfg.num_layers), most)
