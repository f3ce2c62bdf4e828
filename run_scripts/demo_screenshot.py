"""The picture of the page in docs/demo.md: a trained run, one of the drawn scenes, Chromium.

    python run_scripts/demo_screenshot.py RUN [OUT]

Needs the extra `demo`, playwright for Python, and Chromium on the PATH.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 300_000


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", help="run folder, or a bundle's folder")
    p.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "images" / "demo.png")
    p.add_argument("--scene", type=int, default=1, help="which of the drawn scenes (1)")
    p.add_argument("--port", type=int, default=7861)
    args = p.parse_args()

    from lavis_evlgen import plugin  # noqa: F401
    from lavis_evlgen.demo.page import Visitors, start
    from lavis_evlgen.tools import load_trained  # noqa: F401

    load = argparse.Namespace(run=args.run, checkpoint=None, device="cpu")
    model, processor, decoding, device, _ = load_trained.load(load)
    page, address = start(Visitors(model, processor, decoding, device), "127.0.0.1", args.port, block=False)
    args.out.write_bytes(shot(address, args.scene))
    page.close(verbose=False)
    sys.stdout.write(f"{args.out}: {args.out.stat().st_size} bytes\n")


def shot(address: str, scene: int) -> bytes:
    """PNG of the page after a picked scene is captioned."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1240, "height": 900})
        page.set_default_timeout(180_000)
        page.goto(address)
        page.click(f"#examples button.thumbnail-item >> nth={scene - 1}")
        page.wait_for_selector("#preview img")
        page.click("#say")
        page.wait_for_selector("#tokens img")
        page.wait_for_timeout(1500)  # the last of the page's movements
        taken = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        browser.close()
    for colours in (256, 128, 64):
        buffer = io.BytesIO()
        taken.quantize(colours).save(buffer, format="PNG", optimize=True)
        if buffer.tell() < MOST_BYTES:
            break
    return buffer.getvalue()


if __name__ == "__main__":
    main()
