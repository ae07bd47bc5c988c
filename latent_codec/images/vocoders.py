"""Neural networks that turn a spectrogram into sound: HiFi-GAN as `transformers` has it (SpeechT5, AudioLDM)."""

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from latent_codec.images.spectrograms import MelScale


class Vocoder:
    """A HiFi-GAN (arXiv:2010.05646) in the folder of a `SpeechT5HifiGan`.

        image (C, bands, frames) --levels--> log magnitudes (frames, bands) --HiFi-GAN--> samples (frames * hop,)

    It has learned spectrograms of one sample rate, hop and number of bands, and takes no others. The logarithm is to base 10
    where the model standardizes its input, as SpeechT5's does, else natural, as AudioLDM's and HiFi-GAN's own are.
    """

    def __init__(self, model, name: str):
        self.model, self.name = model.eval().requires_grad_(False), name
        config = model.config
        self.bands, self.sample_rate = config.model_in_dim, config.sampling_rate
        self.hop = math.prod(config.upsample_rates)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike) -> "Vocoder":
        """Open a folder, a pipeline's folder with one in vocoder/, or a name on the hub.

        Raises:
            ValueError: where there is none, it is of another class, or `transformers` is missing.
        """
        name = os.fspath(name_or_path)
        folder = Path(name)
        if folder.is_dir():
            folder = folder / "vocoder" if (folder / "vocoder").is_dir() else folder
            _check_config(folder)
        elif folder.exists() or folder.is_absolute() or name.startswith("."):
            raise ValueError(f"{name}: expected the folder of a vocoder; name one with a config.json")
        try:
            from transformers import SpeechT5HifiGan
            from transformers.utils import logging
        except ImportError as error:
            raise ValueError("a vocoder needs transformers: pip install transformers") from error
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of a second, in the middle of this program's own
        try:
            return cls(SpeechT5HifiGan.from_pretrained(str(folder)), name)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name}: the vocoder cannot be opened ({reason})") from error
        finally:
            if shown:
                logging.enable_progress_bar()

    def check(self, scale: MelScale) -> None:
        """Refuse spectrograms that it has not learned.

        Raises:
            ValueError: naming what it takes.
        """
        own = self.bands, self.sample_rate, self.hop
        if own != (scale.bands, scale.sample_rate, scale.hop):
            bands, rate, hop = own
            got = f"{scale.bands} bands at {scale.sample_rate} Hz with a hop of {scale.hop}"
            raise ValueError(
                f"the vocoder {self.name} expects {bands} bands at {rate} Hz with a hop of {hop}, got {got}; encode by a "
                f"codec for audio:{bands},rate={rate},hop={hop}:PATH, or leave the vocoder out"
            )

    @torch.no_grad()
    def samples(self, image: Tensor, scale: MelScale) -> Tensor:
        """Samples of a spectrogram, float32 (frames * hop,) in [-1, 1]. Raises ValueError as `check`."""
        self.check(scale)
        power = scale.levels(image) / 20  # log10 of the magnitudes
        logarithm = power if self.model.config.normalize_before else power * math.log(10)
        return self.model(logarithm.T.contiguous().to(self.model.device)).float().cpu()


def _check_config(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = config.get("model_type"), *config.get("architectures", [])
    except FileNotFoundError:
        raise ValueError(f"{folder}: expected the folder of a vocoder, got one without config.json") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from None
    if "hifigan" not in kind and "SpeechT5HifiGan" not in kind:
        raise ValueError(
            f"{folder}: expected a SpeechT5HifiGan, got {kind[-1]}; Griffin-Lim needs no vocoder"
        )
