"""Adding the node pack to a ComfyUI, and taking it away: one file in its `custom_nodes/`."""

import re
from dataclasses import dataclass
from pathlib import Path

from latent_codec.files import replacing

NAME = "latent_codec_nodes.py"
CONTENT = """\
# Written by `latent-codec comfyui install`; `latent-codec comfyui uninstall` removes it.
from latent_codec.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
"""
ENVIRONMENTS = ("venv", ".venv", "../python_embeded", "../venv")
"""Where a ComfyUI's own Python often is, as seen from its folder."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI, or the base folder of one whose program is elsewhere."""

    folder: Path

    @property
    def file(self) -> Path:
        """What `install` writes."""
        return self.folder / "custom_nodes" / NAME

    @property
    def version(self) -> str | None:
        """Such as "0.3.64"; None where nothing says it."""
        path = self.folder / "comfyui_version.py"
        found = re.search(r'__version__ = "([^"]+)"', path.read_text()) if path.is_file() else None
        return found and found[1]

    @property
    def environment(self) -> Path | None:
        """The folder of its own Python environment, if it is in a usual place."""
        folders = ((self.folder / name).resolve() for name in ENVIRONMENTS)
        return next((folder for folder in folders if folder.is_dir()), None)


def find_host(path: Path) -> Host:
    """The ComfyUI at `path`, or in its subfolder ComfyUI, as in the portable version.

    Raises:
        ValueError: if there is none.
    """
    for folder in (path, path / "ComfyUI"):
        is_program = (folder / "comfy" / "sd.py").is_file() and (folder / "nodes.py").is_file()
        is_base = (folder / "custom_nodes").is_dir() and (folder / "models").is_dir()
        if is_program or is_base:
            return Host(folder)
    raise ValueError(
        f"{path} is no ComfyUI: expected its nodes.py and comfy/, or a base folder with custom_nodes/ and models/"
    )


def install(path: Path) -> Host:
    """Add the node pack; once more changes nothing.

    Raises:
        ValueError: if `path` is no ComfyUI, or the file there was changed.
    """
    host = find_host(path)
    _check_unchanged(host)
    with replacing(host.file) as written:
        written.write_text(CONTENT, encoding="utf-8")
    return host


def uninstall(path: Path) -> Host:
    """Take the node pack away.

    Raises:
        ValueError: if `path` is no ComfyUI, or the node pack is not there or was changed.
    """
    host = find_host(path)
    if not host.file.exists():
        raise ValueError(
            f"{host.folder} has no {host.file.relative_to(host.folder)}: there is nothing to uninstall"
        )
    _check_unchanged(host)
    host.file.unlink()
    return host


def _check_unchanged(host: Host) -> None:
    if host.file.exists() and host.file.read_text(encoding="utf-8", errors="replace") != CONTENT:
        raise ValueError(f"{host.file} was changed since it was installed; remove it yourself if it may go")
