"""Errors of compressed files, by class; all are ValueErrors."""


class BitstreamError(ValueError):
    """A compressed file that cannot be decoded."""


class NotCompressedError(BitstreamError):
    """The data are not a compressed file of this format."""


class NewerFormatError(BitstreamError):
    """The file has a later version, or needs a feature that this reader does not know."""


class WrongCodecError(BitstreamError):
    """The file belongs to another codec's latent space."""


class WrongEntropyModelError(BitstreamError):
    """The file was coded with another entropy model, or needs one and got none."""


class TruncatedError(BitstreamError):
    """The file is shorter than its header states."""


class CorruptError(BitstreamError):
    """The file is damaged; the message names the part, and `section` its number if it is a section."""

    def __init__(self, message: str, section: int | None = None):
        super().__init__(message)
        self.section = section


class TooLargeError(BitstreamError):
    """The file is larger than this reader accepts."""
