"""Checksums of files of weights, and whether all of their numbers are finite.

torch.save writes files in zip format with a CRC-32 of every member, which torch.load never looks at: a flipped bit
loads silently. Safetensors files have no checksum; a bundle's config.json holds their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DIGESTS = "sha256"  # the key of config.json's lavis_evlgen section: {file name: hex digest}
_CHUNK = 1 << 22  # bytes


def check_crc(file: str | Path) -> None:
    """Raises ValueError for a zip file (of torch.save) with a member that is not what was written.

    A file without checksums, such as one in torch's older format, passes.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if not any(member.CRC for member in members):  # written with torch.serialization.set_crc32_options(False)
            return
        try:
            broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"it is damaged: {error}") from error
    if broken is not None:
        raise ValueError(f"it is damaged: the checksum of {broken} is wrong")


def read_torch(file: str | Path):
    """The content of a file of torch.save, on the CPU and without running pickled code, after a look at its checksums.

    Raises ValueError for a damaged file, and whatever torch.load raises.
    """
    if Path(file).stat().st_size == 0:
        raise ValueError("it is empty (0 bytes)")
    check_crc(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def sha256_of(file: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_digest(file: str | Path) -> None:
    """Raises ValueError when the config.json beside `file` has another digest of it; one without a digest passes."""
    config = Path(file).with_name("config.json")
    if not config.is_file():
        return
    try:
        about = json.loads(config.read_text(encoding="utf-8")).get("lavis_evlgen")
    except (OSError, ValueError, AttributeError, RecursionError):  # no bundle: its reader reports why
        return
    digests = about.get(DIGESTS) if isinstance(about, dict) else None
    expected = digests.get(Path(file).name) if isinstance(digests, dict) else None
    if expected is not None and expected != sha256_of(file):
        raise ValueError(f"it is damaged, or not the file that {config} was written with (its SHA-256 differs)")


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every number of every tensor is finite: one boolean tensor () on their device, nothing is read."""
    # the smallest and the largest number are not finite when any is not, and cost no temporary copy
    bounds = [bound for tensor in tensors if _checkable(tensor) for bound in torch.aminmax(tensor.detach())]
    if not bounds:
        return torch.ones((), dtype=torch.bool)
    return torch.isfinite(torch.stack([bound.float() for bound in bounds])).all()


def first_not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None where all is well."""
    if all_finite(state.values()).item():
        return None
    return next(name for name, tensor in state.items() if not all_finite([tensor]).item())


def _checkable(tensor) -> bool:
    is_floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return is_floating and tensor.numel() > 0 and not tensor.is_meta
