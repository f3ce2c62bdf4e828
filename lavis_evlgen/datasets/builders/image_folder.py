"""Pictures of a data set that are files below one folder."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from lavis_evlgen.datasets.annotations.files import WHERE_FROM
from lavis_evlgen.media.errors import DataError
from lavis_evlgen.media.images import open_image


class ImageFolder:
    """Mixin of a data set whose rows name their `image` below the folder `images`, for its `vis_processor`."""

    annotation: list[dict]

    def __init__(self, *args, images: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.vis_root = str(images)

    def _load(self, row: dict) -> Image.Image:
        return open_image(self.path_of(row["image"]), self.vis_processor)

    def file_of(self, row: dict) -> str | None:
        return self.path_of(row["image"])

    def path_of(self, name: str) -> str:
        return os.path.join(self.vis_root, name)

    def iter_image_paths(self) -> Iterator[str]:
        """The path of every image of this split, each once, in row order."""
        for name in dict.fromkeys(row["image"] for row in self.annotation):
            yield self.path_of(name)

    def missing_files(self) -> list[str]:
        """Paths of the images that are not on disk; lists each folder once, not every file."""
        listings: dict[str, set[str]] = {}
        missing = []
        for path in self.iter_image_paths():
            folder, name = os.path.split(path)
            if folder not in listings:
                listings[folder] = _file_names(folder)
            if name not in listings[folder]:
                missing.append(path)
        return missing


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a name that holds a null character
        return set()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return set()
        raise DataError(f"the images folder {folder} cannot be read ({error.strerror}); see its permissions") from None


def data_folder(folder, config_path: str, key: str = "images") -> str:
    """`folder`, the value of `key` in the config's section `config_path`. Raises DataError where it is no folder."""
    if not folder:
        raise DataError(f"the {key} folder is not given; set {config_path}.{key}=FOLDER")
    try:
        is_folder = Path(folder).is_dir()
    except OSError as error:  # no right to look, or a name that cannot be one
        raise DataError(f"{config_path}.{key}={str(folder)[:300]} cannot be read ({error.strerror})") from None
    if not is_folder:
        raise DataError(f"{config_path}.{key}={folder} is not a folder here ({Path.cwd()}); {WHERE_FROM}")
    return str(folder)
