"""Errors of data: a mistake in what was asked for, and an image that cannot be read."""

from lavis_evlgen.errors import UserError
from lavis_evlgen.media.file_checks import Unreadable


class DataError(UserError, ValueError):
    """Data or a data config that cannot be used; the message names what is wrong, where, and the fix."""


class UnreadableImage(Unreadable, DataError):
    """One image that cannot be read."""

    media = "image"
