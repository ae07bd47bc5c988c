"""Where data sets of latents are, known by their names only: nothing heavy is loaded to tell."""

import os

INDEX = "index.json"
"""Written last: by it a data set is complete."""
SHARDS = "shards"


def is_data_set(location: str | os.PathLike) -> bool:
    """Whether a folder is a data set of latents; of a URL, whether it cannot be anything else here."""
    name = os.fspath(location)
    return "://" in name or (
        os.path.isfile(os.path.join(name, INDEX)) and os.path.isdir(os.path.join(name, SHARDS))
    )


def may_be_data_set(location: str | os.PathLike) -> bool:
    """Whether it is one, or was to become one and is not complete."""
    name = os.fspath(location)
    is_codec = os.path.exists(os.path.join(name, "config.json"))
    return is_data_set(name) or (os.path.isdir(os.path.join(name, SHARDS)) and not is_codec)
