"""GPUs that `evlgen estimate` knows, by their makers' data sheets. Standard library only: its parser reads this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
ASSUMED = 0.37  # of a GPU's peak, where no step was measured on it: what the paper's hours on A100s are in these FLOPs


@dataclass(frozen=True)
class Hardware:
    """gb: memory; half and single: dense FLOPs a second by the maker's data sheet, on tensor cores and in float32."""

    name: str
    gb: float
    half: float
    single: float
    bf16: bool = True

    def is_called(self, device: str) -> bool:
        """Whether the driver's name of a device, such as NVIDIA A100-SXM4-80GB, is of this chip."""
        return re.search(rf"\b{self.name}\b", device) is not None


HARDWARE = {
    "h200": Hardware("H200", 141, 989e12, 67e12),
    "h100": Hardware("H100", 80, 989e12, 67e12),
    "a100-80g": Hardware("A100", 80, 312e12, 19.5e12),
    "a100-40g": Hardware("A100", 40, 312e12, 19.5e12),
    "l40s": Hardware("L40S", 48, 362e12, 91.6e12),
    "a6000": Hardware("A6000", 48, 155e12, 38.7e12),
    "a10": Hardware("A10", 24, 125e12, 31.2e12),
    "4090": Hardware("4090", 24, 165e12, 82.6e12),
    "3090": Hardware("3090", 24, 71e12, 35.6e12),
    "v100": Hardware("V100", 32, 125e12, 15.7e12, bf16=False),
    "t4": Hardware("T4", 16, 65e12, 8.1e12, bf16=False),
}
CPU = "cpu"  # no data sheet: only what was measured
