"""The two errors of the data room: a mistake in what was asked for, and a picture that cannot be read."""

from lavis_evlgen.media.file_checks import Unreadable


class DataError(ValueError):
    """Data or a data config that cannot be used; the message names the thing, the place and the mend."""


class UnreadableImage(Unreadable, DataError):
    """One picture that cannot be read."""

    THING = "image"
