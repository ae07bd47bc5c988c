"""How a codec is finished: calibrated, with what that measured in its model card."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from latent_codec.codec import LatentCodec
from latent_codec.components.codec_folders import ORIGIN, SIDECARS
from latent_codec.evaluation import calibration
from latent_codec.families import family_of
from latent_codec.images.decoding import ImageError
from latent_codec.images.origins import Origin
from latent_codec.images.sources import ImageSource
from latent_codec.training.build import Autoencoder
from latent_codec.training.config import TrainingConfig
from latent_codec.training.finish import to_stored_dtype, write_network

LEAST_CALIBRATION_IMAGES = 8
LEAST_LOG_VARIANCE = -30.0  # where diffusers clamps a posterior's: a standard deviation of 3e-7


def finish_codec(
    config: TrainingConfig,
    autoencoder: Autoencoder,
    source: ImageSource,
    run: Path,
    *,
    data_name: str,
    on_progress: Callable[..., None] | None = None,
    unfinished_at: int | None = None,
) -> Path:
    """Write RUN/codec as `finish_network` does, at the end calibrated.

    Until then its scale and shift are those that it began with.

    Args:
        source: what scale, shift and half-precision safety are measured on.
        on_progress: called by `calibration.measure`.
    """
    autoencoder = copy.deepcopy(autoencoder)
    if _has_untrained_variance(config, autoencoder):
        silence_posterior(autoencoder)
    measured = None
    if unfinished_at is None and config.run.calibration_images:
        codec = LatentCodec(autoencoder, name=run.resolve().name, pipeline=config.model.pipeline)
        measured = calibration.measure(
            codec, source, num_images=num_calibration_images(config), on_progress=on_progress
        )
        calibration.calibrate(codec, measured, convention_of(config, codec))
    stored = to_stored_dtype(config, autoencoder)
    return write_network(
        config,
        stored,
        run,
        "Trained",
        data_name=data_name,
        front_matter=(
            "tags: [autoencoder, latent-codec]",
            f"lpips_trained: {str(config.objective.lpips_weight > 0).lower()}",
        ),
        facts=_facts(config, LatentCodec(stored, pipeline=config.model.pipeline), measured),
        unfinished_at=unfinished_at,
        not_yet=", scale and shift are not measured",
        superseded=(ORIGIN, *SIDECARS),
        pipeline=config.model.pipeline,
        others={} if (origin := _origin(config, source)) is None else {ORIGIN: json.dumps(origin.to_json())},
    )


def _origin(config: TrainingConfig, source: ImageSource) -> Origin | None:
    """What images of the codec stand for, of the size of the training's crops; by the first image that can be read."""
    for index in range(len(source)):
        with suppress(ImageError):
            origin = source.origin(index)
            return origin and origin.for_size(*config.data.size)
    return None


def convention_of(config: TrainingConfig, codec: LatentCodec) -> calibration.Convention:
    """How the measured scale and shift are written at the end.

    Raises:
        ValueError: if the codec's pipeline would not read them.
    """
    if codec.family.read_entries == ():
        return "keep"  # latents that are standardized by construction
    if config.model.train == "decoder" or config.objective.reference or config.objective.rate_weight:
        return "keep"  # the latent space of its encoder, of the codec that its latents stay near, or of its context model
    if not codec.family.folds_statistics:
        return calibration.usual_convention(codec)
    calibration.check_convention(codec, "normalize")
    return "normalize"


def num_calibration_images(config: TrainingConfig) -> int:
    """`run.calibration_images`, or fewer after a short run, so that measuring takes at most about a tenth of it.

    A training step costs about six times the encoding of as many pixels: forward and backward, encoder and decoder.
    """
    height, width = config.data.size
    trained = config.run.steps * config.optimizer.batch_size * config.optimizer.accumulation * height * width
    affordable = int(0.6 * trained / calibration.MAX_SIDE**2)
    return min(config.run.calibration_images, max(affordable, LEAST_CALIBRATION_IMAGES))


@torch.no_grad()
def silence_posterior(autoencoder: AutoencoderKL) -> None:
    """Set the posterior's variance to its minimum: a sample is the mean, which is all that the decoder knows."""
    head = autoencoder.encoder.conv_out if autoencoder.quant_conv is None else autoencoder.quant_conv
    head.weight[autoencoder.config.latent_channels :] = 0
    head.bias[autoencoder.config.latent_channels :] = LEAST_LOG_VARIANCE


def _has_untrained_variance(config: TrainingConfig, autoencoder: Autoencoder) -> bool:
    """A plain autoencoder's decoder saw the posterior's mean only, so that nothing trained its variance."""
    is_plain = config.objective.posterior == "mean" and config.model.train == "all"
    return is_plain and family_of(autoencoder).has_posterior


def _facts(config: TrainingConfig, codec: LatentCodec, measured: calibration.Calibration | None) -> list[str]:
    """What a model card says of a codec as stored."""
    facts = []
    if measured:
        facts += [
            f"Reconstruction by precision: {', '.join(map(_parity, measured.parity))} ({measured.parity_note})",
            f"Largest activation: {measured.largest_activation:.0f} (float16 ends at 65504)",
        ]
    if _has_untrained_variance(config, codec.autoencoder):
        facts.append(
            "The posterior's variance is untrained, as the decoder saw its mean only. It is set to its minimum, so "
            "that a sample is the mean; random latents decode to nothing in particular."
        )
    if config.model.train == "decoder":
        origin = config.model.pretrained or "the linear start"
        if Path(origin).exists():
            origin = Path(origin).resolve().name
        facts.append(
            f"Only the decoder was trained. All other weights are those of {origin}, to the bit in float32, "
            f"and its latents decode here: space fingerprint {codec.space_fingerprint}."
        )
    return facts


def _parity(each: calibration.PrecisionParity) -> str:
    if each.psnr is None:
        return f"{each.dtype} not finite"
    return f"{each.dtype} {each.psnr:.2f} dB" + (
        f" (-{each.psnr_lost:.3f})" if each.psnr_lost and each.psnr_lost >= 5e-4 else ""
    )
