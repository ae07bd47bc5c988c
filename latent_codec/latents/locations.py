"""Where data sets of latents are, known by their names only: nothing heavy is loaded to tell."""

import os

INDEX = "index.json"
"""Written last: by it a data set is complete."""
SHARDS = "shards"


def is_data_set(location: str | os.PathLike) -> bool:
    """Whether a folder is a data set of latents, or was to become one; of a URL, whether it cannot be anything else here."""
    name = os.fspath(location)
    if "://" in name:
        return True
    return os.path.isdir(os.path.join(name, SHARDS)) and not os.path.exists(os.path.join(name, "config.json"))


def is_complete_data_set(location: str | os.PathLike) -> bool:
    """Whether a folder has the index and the shards of a data set of latents."""
    name = os.fspath(location)
    return os.path.isfile(os.path.join(name, INDEX)) and os.path.isdir(os.path.join(name, SHARDS))
