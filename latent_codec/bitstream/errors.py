"""What can be wrong with a compressed file, told apart by class; all are ValueErrors."""


class BitstreamError(ValueError):
    """A compressed file that cannot be decoded."""


class NotCompressedError(BitstreamError):
    """The data are not a compressed file of this format."""


class NewerFormatError(BitstreamError):
    """The file has a later version, or needs a feature that this reader does not know."""


class WrongCodecError(BitstreamError):
    """The file belongs to another codec's latent space."""


class WrongEntropyModelError(BitstreamError):
    """The file was coded with another entropy model, or needs one and none came."""


class TruncatedError(BitstreamError):
    """The file ends before its header says."""


class CorruptError(BitstreamError):
    """The file is damaged; the message names the part, and `section` is its number where it is a section."""

    def __init__(self, message: str, section: int | None = None):
        super().__init__(message)
        self.section = section


class TooLargeError(BitstreamError):
    """The file says that it holds more than this reader takes on."""
