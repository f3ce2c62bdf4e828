"""The two errors of the data room: a mistake in what was asked for, and a picture that cannot be read."""

from lavis_evlgen.clips import UnreadableVideo


class DataError(ValueError):
    """Data or a data config that cannot be used; the message names the thing, the place and the mend."""


class UnreadableImage(DataError):
    """One picture that cannot be read. `path` says which (str), `reason` why (str, one line)."""

    def __init__(self, path, reason: str = ""):
        super().__init__(str(path), reason)  # both as args, so that the error survives pickling by a worker
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"cannot read the image {self.path}: {self.reason}"


UNREADABLE = (UnreadableImage, UnreadableVideo)  # what may be wrong with one sample: counted, not fatal
