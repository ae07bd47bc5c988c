"""The whole way from a source to what is written: `convert`, as the verb of that name does it."""

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from latent_codec.components.weight_files import check_folder_to_save
from latent_codec.conversion.checkpoints import SUFFIXES
from latent_codec.conversion.foreign import FORMATS, Foreign, read_foreign
from latent_codec.conversion.ldm_config import SETTINGS, check_config, read_config, scale_of
from latent_codec.conversion.renaming import ConversionSettingError, Scale
from latent_codec.conversion.scales import SCALES, named_scale
from latent_codec.conversion.settings import Settings, combine, read_diffusers_config
from latent_codec.errors import SettingError

if TYPE_CHECKING:  # torch and diffusers are imported once a source is known to be convertible
    import torch

FOREIGN = tuple(dict.fromkeys(name for each in FORMATS for name in each.names if name != "diffusers"))
"""Formats that `convert` writes, next to diffusers' own."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of `convert`: the source's format, its keys and scale, the files written."""

    source: str
    """Title of the source's format."""
    keys: dict[str, int]
    """Keys mapped, left out by each rule, missing and unexpected."""
    scaling_factor: float
    shift_factor: float | None
    scale_known_by: str
    written: list[Path]
    wrapper: str | None = None
    """The entry of the file that holds all its tensors, such as Lightning's state_dict."""
    prefix: str | None = None
    """Of the autoencoder's keys."""
    averaged_weights: tuple[str, ...] = ()
    """Entries with averaged weights of the same autoencoder, which were not taken; each is a value for `entry`."""
    settings_known_by: str | None = None
    """Source of the settings that weights do not show (groups of norms, activation)."""
    other_classes: tuple[str, ...] = ()
    """What else the source could become; each is a value for `class_name`."""


def convert(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    to: str = "diffusers",
    dtype: "torch.dtype | None" = None,
    entry: str | None = None,
    config: str | os.PathLike | None = None,
    norm_num_groups: int | None = None,
    class_name: str | None = None,
    scale: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    calibrate: str | os.PathLike | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Conversion:
    """Turn a foreign checkpoint into a diffusers folder, or a codec into a foreign checkpoint.

        convert("vae.ckpt", "runs/mine", scale="sd1")           a latent-diffusion VAE
        convert("sd-v1-5.safetensors", "runs/vae")              the VAE inside a whole Stable Diffusion file
        convert(["encoder.pth", "decoder.pth"], "runs/taesd")   the two files of a tiny autoencoder
        convert("runs/mine", "mine.safetensors", to="ldm")      a codec, under latent-diffusion's names

    Format and network are recognized by the names and shapes of tensors. Every key is mapped, left out by a rule that
    the result names, missing, or unexpected; the last two are errors. What was written is read again and compared, and
    takes its name only if it is equal to the bit.

    Args:
        source: a checkpoint file, or the two files of a tiny autoencoder; or a codec: a folder, a shipped name, a hub id.
        out: a folder that is new or holds a codec; with `to`, a new file (.safetensors, .ckpt, .pt or .pth), for taesd a
            new folder.
        to: "diffusers", or the format of an original code: one of `FOREIGN`.
        dtype: of the written weights; None keeps those of the source.
        entry: the entry or prefix of the file to take, such as "ema"; None: the only autoencoder, or the one that is
            not averaged.
        config: a diffusers config.json for the weights, or the original's yaml, which has to agree with them.
        norm_num_groups: groups of the norms, for weights in diffusers' own key layout without their config.json.
        class_name: of the component, where one file fits several classes, such as Wan 2.1's and Qwen-Image's.
        scale: of the latents, by the model family: "sd1", "sdxl", "sd3" or "flux".
        scaling_factor, shift_factor: of the latents, as numbers.
        calibrate: images to measure the scale of the latents on, as `evaluation.calibration` does.
        on_progress: called during calibration with what is done, the total, and what is being done.

    Returns:
        What was found and written.

    Raises:
        ConversionError: if the source holds no known autoencoder, a key has no place, weights are not finite numbers,
            or `to` cannot hold the autoencoder. Nothing is written.
        SettingError: for settings that do not fit the source or each other, and where `scale`, `config` or `entry` is
            needed.
        ValueError: for other sources and destinations.
        OSError: if it cannot be written.
    """
    out = Path(out)
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    _check_numbers(norm_num_groups, scaling_factor, shift_factor)
    asked = named_scale(scale) if scale is not None else None
    if scaling_factor is not None:
        asked = Scale(scaling_factor, shift_factor, "as asked")
    if sum(each is not None for each in (scale, scaling_factor, calibrate)) > 1:
        raise SettingError(
            "scale",
            "the scale in one way",
            advice="leave out all but one of `scale`, `scaling_factor` and `calibrate`",
        )
    _check_destination(out, to)
    if to != "diffusers" and calibrate is not None:
        raise SettingError("calibrate", "a diffusers folder as the result", to, advice="convert to one first")
    if not _are_files(sources):
        for name, value in {
            "entry": entry,
            "norm_num_groups": norm_num_groups,
            "class_name": class_name,
            "config": config,
            "calibrate": calibrate,
        }.items():
            if value is not None:
                raise SettingError(
                    name,
                    f"a checkpoint file to apply it to; {sources[0]} is a codec",
                    value,
                    advice="leave it out",
                )
        return _convert_codec(sources[0], out, to, dtype, asked)
    settings, original = _settings(config, norm_num_groups)
    foreign = read_foreign(sources, entry=entry, settings=settings, class_name=class_name)
    if asked is not None or calibrate is not None:
        _check_scalable(foreign.network.network_class)
    scale = asked or (original and scale_of(original)) or foreign.scale
    foreign = replace(foreign, scale=scale)
    foreign.keys.check(foreign.name)
    if original is not None:
        check_config(original, foreign.network.config, str(config))
    if scale is None and calibrate is None:
        raise _scale_needed(foreign)
    from latent_codec.conversion.writing import write_diffusers, write_foreign

    if to == "diffusers":
        write_diffusers(foreign, out, dtype=dtype, card=_card(foreign))
        written = [out]
        if calibrate is not None:
            scale = _calibrate(out, calibrate, on_progress)
    else:
        written = write_foreign(foreign.component(), to, out, dtypes=dtype)
    return Conversion(
        source=foreign.format.title,
        keys=foreign.keys.counts(),
        scaling_factor=scale.scaling_factor,
        shift_factor=scale.shift_factor,
        scale_known_by=scale.rule,
        written=written,
        wrapper=foreign.wrapper,
        prefix=foreign.prefix.rstrip(".") or None,
        averaged_weights=tuple(each.rstrip(".") for each in foreign.averages),
        settings_known_by=foreign.settings,
        other_classes=tuple(each.class_name for each in foreign.format.twins),
    )


def _check_numbers(
    norm_num_groups: int | None, scaling_factor: float | None, shift_factor: float | None
) -> None:
    if scaling_factor is not None and not 0 < scaling_factor < math.inf:  # which no codec can be opened with
        raise SettingError("scaling_factor", "a finite number above 0", scaling_factor)
    if shift_factor is not None and not math.isfinite(shift_factor):
        raise SettingError("shift_factor", "a finite number", shift_factor)
    if shift_factor is not None and scaling_factor is None:
        raise SettingError(
            "shift_factor", "none without a scaling factor", shift_factor, advice="give `scaling_factor`, too"
        )
    if norm_num_groups is not None and norm_num_groups < 1:
        raise SettingError("norm_num_groups", "an integer of at least 1", norm_num_groups)


def _check_destination(out: Path, to: str) -> None:
    """Raise ValueError for a format that is not known, and where it cannot be written."""
    is_file_name = out.suffix in SUFFIXES
    if to == "diffusers":
        if is_file_name:
            raise SettingError(
                "out",
                "the name of a folder, as a diffusers component is one",
                str(out),
                advice=f"name one, or say by `to` what the file is to hold ({', '.join(FOREIGN)})",
            )
        check_folder_to_save(out)
        return
    if to not in FOREIGN:
        raise SettingError("to", f"one of diffusers, {', '.join(FOREIGN)}", to)
    if out.exists():
        raise ValueError(f"{out} exists; name a new file")
    if to == "taesd" and is_file_name:
        raise SettingError("out", "the name of a folder for the two files of taesd", str(out))
    if to != "taesd" and not is_file_name:
        raise SettingError("out", f"a file name that ends in one of {', '.join(SUFFIXES)}", str(out))


def _are_files(sources: Sequence[str | os.PathLike]) -> bool:
    """Whether the sources are checkpoint files; one that is not is a codec's folder, shipped name or hub id."""
    paths = [Path(source) for source in sources]
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a pipe or a device; give a checkpoint file or a codec's folder")
    folders = [path for path in paths if not path.is_file()]
    if folders and len(paths) > 1:
        raise ValueError(f"{folders[0]} is no file; several sources are the two files of a tiny autoencoder")
    return not folders


def _scale_needed(foreign: Foreign) -> ConversionSettingError:
    """The error for a scale that nothing says, with those of published models of this shape."""
    measured = "`scaling_factor=X` (1 leaves them as they are), or `calibrate=IMAGES` to measure it"
    nothing = f"as nothing in {foreign.name} says the scale of its latents"
    if published := foreign.format.published_scales(foreign.network.config):
        expected = f"the number of its model, {nothing}; published are {published}"
        return ConversionSettingError("scaling_factor", expected, advice=f"give {measured}")
    expected = f"one of {', '.join(SCALES)}, {nothing}"
    return ConversionSettingError("scale", expected, advice=f"give `scale=sd1` or the like, {measured}")


def _check_scalable(network_class: type) -> None:
    """Raise SettingError if a scale was asked for and the class has no entry for it."""
    if "scaling_factor" not in inspect.signature(network_class.__init__).parameters:
        raise SettingError(
            "scale",
            f"none: {network_class.__name__} has no scaling_factor, and normalizes each channel by its own statistics",
            advice="leave out `scale`, `scaling_factor` and `calibrate`",
        )


def _settings(
    config: str | os.PathLike | None, norm_num_groups: int | None
) -> tuple[Settings | None, dict | None]:
    """The settings that are asked for, and the original's yaml, if `config` is that."""
    asked = None
    if norm_num_groups is not None:
        rule = f"norm_num_groups {norm_num_groups} as asked, the class's defaults for the others"
        asked = Settings({"norm_num_groups": norm_num_groups}, rule)
    if config is None:
        return asked, None
    given = read_diffusers_config(config)
    if given is not None:
        return combine(asked, Settings(given, f"the given {Path(config).name}")), None
    return combine(asked, SETTINGS), read_config(config)


def _convert_codec(source: str | os.PathLike, out: Path, to: str, dtype, asked: Scale | None) -> Conversion:
    """A codec -> a foreign file, or a diffusers folder of another precision."""
    from latent_codec.codec import LatentCodec
    from latent_codec.components.codec_folders import find_weights
    from latent_codec.components.loading import open_weights
    from latent_codec.conversion.writing import write_component, write_foreign

    codec = LatentCodec.from_pretrained(source)
    component = codec.autoencoder
    if asked is not None:
        _check_scalable(type(component))
        scale = {"scaling_factor": asked.scaling_factor, "shift_factor": asked.shift_factor}
        component.register_to_config(
            **{key: value for key, value in scale.items() if key in component.config}
        )
    dtypes = dtype or open_weights(find_weights(source)).dtypes
    if to == "diffusers":
        write_component(component, out, dtypes=dtypes, pipeline=codec.pipeline)
        written = [out]
    else:
        written = write_foreign(component, to, out, dtypes=dtypes)
    scale = asked or Scale(
        codec.latent_space.scaling_factor, component.config.get("shift_factor"), "the codec's own config"
    )
    return Conversion(
        source=f"diffusers {type(component).__name__}",
        keys={"mapped": len(component.state_dict())},
        scaling_factor=scale.scaling_factor,
        shift_factor=scale.shift_factor,
        scale_known_by=scale.rule,
        written=written,
    )


def _calibrate(folder: Path, data: str | os.PathLike, on_progress) -> Scale:
    """Measure scale and shift on images and write them into the folder."""
    from latent_codec.codec import LatentCodec
    from latent_codec.evaluation.calibration import calibrate

    codec = LatentCodec.from_pretrained(folder)
    calibrate(codec, data, on_progress=on_progress)
    codec.save_pretrained(folder)
    return Scale(codec.latent_space.scaling_factor, codec.latent_space.shift_factor, f"measured on {data}")


def _card(foreign: Foreign) -> str:
    """The model card of a converted checkpoint."""
    counts = "\n".join(f"- {name}: {count}" for name, count in foreign.keys.counts().items())
    scale = "measured after conversion" if foreign.scale is None else foreign.scale.rule
    return (
        f"# {foreign.network.network_class.__name__} from {foreign.name}\n\n"
        f"Converted from the {foreign.format.title} `{foreign.name}` by latent-codec.\n\n"
        f"Keys:\n\n{counts}\n\nScale of the latents: {scale}.\n\n"
        "The weights' licence is that of the source.\n"
    )
