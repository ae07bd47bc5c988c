"""What all tabs of the page share: the codecs to choose from, and the pipelines, each opened once; what is kept on disk; bounds."""

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.components.codec_facts import read_facts
from latent_codec.components.codec_folders import (
    SHIPPED,
    SHIPPED_PIPELINES,
    find_weights,
    is_foreign_file,
    short_name,
)
from latent_codec.errors import SettingError
from latent_codec.images.sample_photograph import SAMPLE_SIZE, sample_photograph
from latent_codec.images.tensors import (
    ImageError,
    center_crop,
    image_size,
    read_image,
    shrunk,
    to_pil,
    write_image,
)
from latent_codec.pipelines.folders import load_pipeline
from latent_codec.pipelines.tiny_pipeline import build_tiny_pipeline
from latent_codec.previews.preview_files import copy_preview
from latent_codec.ui.garments import garment

MAX_BYTES = 32 * 2**20
"""Of a file that is dropped on the page."""
MAX_PIXELS = 2**25
"""Of an image in it."""
LARGEST = 1024
"""Pixels on the longer side that the page works with: a larger image is shrunk, with a note."""

TINY = "tiny (random weights)"
"""What the page calls the pipeline that is built on the spot."""


class Desk:
    """What the page works with.

    Args:
        codecs: further names or paths, as `LatentCodec.from_pretrained` takes them; the first of them, or else the codec "default", is
            chosen when the page opens.
        pipelines: folders of diffusers pipelines to watch.
        image: that the tabs open with; None: the sample photograph.
        device: for all of it.

    Raises:
        ValueError: for a codec or a pipeline that is not there, or an image that cannot be read.
    """

    def __init__(
        self,
        codecs: Sequence[str | os.PathLike] = (),
        pipelines: Sequence[str | os.PathLike] = (),
        *,
        image: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
    ):
        self.device = device
        self.codecs: dict[str, str] = {}
        """Names on the page -> what opens them."""
        for given in (*map(str, codecs), *SHIPPED):
            if not is_foreign_file(given):
                find_weights(given)  # or it is better said at once
            self.codecs.setdefault(_free_name(given, self.codecs), given)
        self.pipelines: dict[str, Path] = {}
        """Names -> folders, those that the page makes not yet among them."""
        for folder in map(Path, pipelines):
            if not (folder / "model_index.json").is_file():
                raise ValueError(
                    f"{folder}: expected the folder of a pipeline, found no model_index.json in it"
                )
            self.pipelines[_free_name(str(folder), self.pipelines)] = folder
        self._kept = tempfile.TemporaryDirectory(prefix="latent-codec-ui-")
        self.folder = Path(self._kept.name)
        """Where everything goes that the page makes; removed by `close`."""
        self._made: dict[object, Any] = {}
        self._lock = threading.RLock()
        self.image = self.folder / ("photograph.png" if image is None else f"{Path(image).stem}.png")
        """The file of the image that the tabs open with."""
        if image is None:
            first = center_crop(read_image(sample_photograph()), SAMPLE_SIZE)
        else:
            first, _ = read_dropped(image)
        write_image(first, self.image)

    def close(self) -> None:
        """Remove what the page has made."""
        self._kept.cleanup()

    def garment(self, label: str) -> Path:
        """The path of an example."""
        path = self.folder / f"{label}.png"
        if not path.exists():
            write_image(to_pil(garment(label)), path)
        return path

    def codec(self, name: str) -> LatentCodec:
        """The codec of a name on the page, opened when it is first asked for.

        Raises:
            ValueError: for another name, so that the page opens nothing but what it was given.
        """
        if name not in self.codecs:
            raise SettingError("codec", f"one of {', '.join(self.codecs)}", name)
        return self.once(
            ("codec", name), lambda: LatentCodec.from_pretrained(self.codecs[name], device=self.device)
        )

    def warm_up(self) -> None:
        """Open the codec that the page opens with, before somebody asks for it; what goes wrong is said when somebody does."""
        with suppress(Exception):
            self.codec(next(iter(self.codecs)))

    @property
    def compressing(self) -> list[str]:
        """Codecs that can write .lcf files, as far as their folders say, and those that only opening would tell."""
        return [name for name in self.codecs if self.codecs[name] not in SHIPPED or _has_rates(name)]

    @property
    def one_vector(self) -> list[str]:
        """The shipped codec of one vector per image, and those given, which only opening tells."""
        return ["garments", *(name for name in self.codecs if name not in SHIPPED)]

    def codec_of(self, space_fingerprint: str) -> LatentCodec:
        """The codec with this latent space, among those of the page.

        Raises:
            ValueError: if it is none of them.
        """
        for name, path in self.codecs.items():
            facts_fit = path not in SHIPPED or read_facts(path).space_fingerprint == space_fingerprint
            if facts_fit and self.codec(name).space_fingerprint == space_fingerprint:
                return self.codec(name)
        raise ValueError(
            f"it was made by another codec (space {space_fingerprint}) than those here, {', '.join(self.codecs)}; start the page "
            "with that one, too"
        )

    def prior_pipeline(self, name: str = SHIPPED_PIPELINES[0]):
        """A shipped pipeline over a prior."""
        return self.once(("prior", name), lambda: load_pipeline(name, device=self.device))

    def pipeline_folder(self, name: str) -> Path:
        """The folder of a pipeline on the page; that of TINY is made when it is first asked for."""
        if name == TINY:
            return self.once(("tiny",), self._tiny_folder)
        if name not in self.pipelines:
            raise SettingError("pipeline", f"one of {', '.join((TINY, *self.pipelines))}", name)
        return self.pipelines[name]

    def _tiny_folder(self) -> Path:
        folder, codec = self.folder / "tiny", self.codec("default")
        build_tiny_pipeline(codec).save_pretrained(folder)
        copy_preview(codec, LatentCodec.from_pretrained(folder))
        return folder

    def keep(self, image: Image.Image, name: str) -> Path:
        """Write an image where the browser can fetch it."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        write_image(image, folder / f"{name}.png")
        return folder / f"{name}.png"

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` gave when it was first asked for under this key."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


def read_dropped(path: str | os.PathLike | None, channels: int = 3) -> tuple[Tensor, list[str]]:
    """An image that was dropped on the page, (C, H, W) in [-1, 1], of at most LARGEST px on its longer side; and notes on it.

    Raises:
        ValueError: without one, for a file or an image that is too large, or one that cannot be read.
    """
    if path is None:
        raise ValueError("drop an image first, or click on an example")
    name = Path(path).name
    check_bytes(path)
    height, width = image_size(path, name=name)
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"{name}: expected at most {MAX_PIXELS:,} pixels, got {width}x{height}; shrink it, or use the command line"
        )
    image = read_image(path, channels=channels, name=name)
    height, width = image.shape[-2:]
    small = shrunk(image, LARGEST)
    if small is image:
        return image, []
    return small, [
        f"shrunk from {width}x{height} to {small.shape[2]}x{small.shape[1]} px: the page works with up to {LARGEST}"
    ]


def check_bytes(path: str | os.PathLike) -> None:
    """Refuse a file of more than MAX_BYTES."""
    if (size := os.path.getsize(path)) > MAX_BYTES:
        expected = f"expected a file of at most {MAX_BYTES // 2**20} MB"
        raise ValueError(f"{Path(path).name}: {expected}, got {size / 2**20:.0f} MB; use the command line")


def _has_rates(name: str) -> bool:
    return (find_weights(name).parent / "entropy.safetensors").is_file()


def _free_name(path: str, taken) -> str:
    """A short name for a path; the path itself where another has that name."""
    name = path if path in SHIPPED else short_name(path)
    return path if name in taken or (name in SHIPPED and path not in SHIPPED) else name
