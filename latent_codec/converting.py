"""The whole way from a source to what is written: `convert`, as the verb of that name does it."""

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from latent_codec.conversion.foreign import Foreign, read_foreign
from latent_codec.conversion.ldm_config import SETTINGS, check_config, read_config, scale_of
from latent_codec.conversion.renaming import ConversionSettingError, Scale
from latent_codec.conversion.scales import SCALES, named_scale
from latent_codec.conversion.settings import Settings, combine, read_diffusers_config
from latent_codec.errors import SettingError
from latent_codec.exporting import (
    LATENT2RGB,
    Changes,
    card,
    check_destination,
    destination,
    keep_sidecars,
    latent2rgb,
    names_of,
    prepare,
)

if TYPE_CHECKING:  # torch and diffusers are imported once a source is known to be convertible
    import torch

    from latent_codec.codec import LatentCodec


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
    changes: tuple[str, ...] = ()
    """What was done to the network and its scale, a phrase each; images and a denoiser's latents stay the same."""
    place: str | None = None
    """The host, its version, and the folder in which it looks for the files."""
    latent2rgb: dict[str, list] | None = None
    """Factors and bias of the linear preview, where those are asked for."""


def convert(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    to: str | None = None,
    dtype: "torch.dtype | None" = None,
    entry: str | None = None,
    config: str | os.PathLike | None = None,
    norm_num_groups: int | None = None,
    class_name: str | None = None,
    scale: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    calibrate: str | os.PathLike | None = None,
    embed: str | None = None,
    fold_scale: str | None = None,
    host: str | None = None,
    family: str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Conversion:
    """Turn a foreign checkpoint into a diffusers folder, or a codec into what another program loads.

        convert("vae.ckpt", "runs/mine", scale="sd1")           a latent-diffusion VAE
        convert("sd-v1-5.safetensors", "runs/vae")              the VAE inside a whole Stable Diffusion file
        convert(["encoder.pth", "decoder.pth"], "runs/taesd")   the two files of a tiny autoencoder
        convert("runs/mine", "mine.safetensors", to="ldm")      a codec, under latent-diffusion's names
        convert("default", "ComfyUI/models/vae", host="comfyui", fold_scale="sd1")   a codec, as ComfyUI loads it
        convert("default", "runs/wide", embed="sd")             a codec, in Stable Diffusion's wider network

    Format and network are recognized by the names and shapes of tensors. Every key is mapped, left out by a rule that
    the result names, missing, or unexpected; the last two are errors. What was written is read again and compared, and
    takes its name only if it is equal to the bit.

    Args:
        source: a checkpoint file, or the two files of a tiny autoencoder; or a codec: a folder, a shipped name, a hub id.
        out: a folder that is new or holds a codec; with `to`, a new file (.safetensors, .ckpt, .pt or .pth), for taesd a
            folder; with `host`, a folder for files of the host's names. None: nothing is written, for latent2rgb.
        to: "diffusers", the format of an original code (one of `FOREIGN`), or "latent2rgb", the factors and bias of a
            codec's linear preview; None: what `host` loads, or else "diffusers".
        dtype: of the written weights; None keeps those of the source.
        entry: the entry or prefix of the file to take, such as "ema"; None: the only autoencoder, or the one that is
            not averaged.
        config: a diffusers config.json for the weights, or the original's yaml, which has to agree with them.
        norm_num_groups: groups of the norms, for weights in diffusers' own key layout without their config.json.
        class_name: of the component, where one file fits several classes, such as Wan 2.1's and Qwen-Image's.
        scale: of the latents, by the model family: "sd1", "sdxl", "sd3" or "flux".
        scaling_factor, shift_factor: of the latents, as numbers.
        calibrate: images to measure the scale of the latents on, as `evaluation.calibration` does.
        embed: "sd": write the same function as Stable Diffusion's network, for an AutoencoderKL that is narrower.
        fold_scale: write raw latents that the scale of this family ("sd1", "sdxl", "sd3" or "flux") makes this codec's latents.
        host: write what this program loads, one of "comfyui", "a1111", "invokeai" and "diffusers", under its names.
        family: of the host's denoisers, by which it finds a tiny autoencoder's two files: "sd1", "sdxl", "sd3", "flux", "flux2".
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
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    changes = Changes(embed=embed, fold_scale=fold_scale, host=host, family=family)
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
    if to == LATENT2RGB:
        return _preview_factors(sources[0], out, changes)
    if out is None:
        raise SettingError("out", "a folder, or a file with `to`")
    out = Path(out)
    if to is not None or not changes.host:
        to = to or "diffusers"
        check_destination(out, to, changes.host)
    if calibrate is not None and (to != "diffusers" or changes):
        got = next((each for each in (host, embed, fold_scale) if each), to)
        raise SettingError(
            "calibrate", "a diffusers folder as the only result", got, advice="convert to one first"
        )
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
        return _convert_codec(sources[0], out, to, dtype, asked, changes)
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
    place, steps = None, ()
    if to == "diffusers" and not changes:
        from latent_codec.conversion.writing import write_diffusers

        write_diffusers(foreign, out, dtype=dtype, card=_card(foreign))
        written = [out]
        if calibrate is not None:
            scale = _calibrate(out, calibrate, on_progress)
    else:
        from latent_codec.codec import LatentCodec

        codec = LatentCodec(foreign.component(), name=Path(sources[0]).stem)
        written, steps, place = _write(codec, out, to, dtype, changes, _card(foreign))
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
        changes=steps,
        place=place,
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


def _preview_factors(
    source: str | os.PathLike, out: str | os.PathLike | None, changes: Changes
) -> Conversion:
    """`Conversion` of a codec's linear preview, written as JSON where there is a destination."""
    if changes:
        raise SettingError(
            "to",
            "a network, which is changed, or factors on their own",
            LATENT2RGB,
            advice="leave one of them out",
        )
    factors = latent2rgb(source)
    if out is not None:
        from latent_codec.files import replacing

        if Path(out).exists():
            raise ValueError(f"{out} exists; name a new file")
        with replacing(out) as written:
            written.write_text(json.dumps(factors, indent=2) + "\n", encoding="utf-8")
    return Conversion(
        source=f"linear preview of {source}",
        keys={"mapped": 2},
        scaling_factor=1.0,
        shift_factor=None,
        scale_known_by="it shows latents as a denoiser has them",
        written=[] if out is None else [Path(out)],
        latent2rgb=factors,
    )


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


def _convert_codec(
    source: str | os.PathLike, out: Path, to: str | None, dtype, asked: Scale | None, changes: Changes
) -> Conversion:
    """A codec -> files of another format, or a diffusers folder of another precision, scale or network."""
    from latent_codec.codec import LatentCodec
    from latent_codec.components.codec_folders import find_weights
    from latent_codec.components.loading import open_weights

    codec = LatentCodec.from_pretrained(source)
    component = codec.autoencoder
    weights = find_weights(source)
    if asked is not None:
        _check_scalable(type(component))
        scale = {"scaling_factor": asked.scaling_factor, "shift_factor": asked.shift_factor}
        component.register_to_config(
            **{key: value for key, value in scale.items() if key in component.config}
        )
        codec = LatentCodec(component, name=codec.name, pipeline=codec.pipeline)
    dtypes = dtype or open_weights(weights).dtypes
    readme = weights.parent / "README.md"
    former = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
    is_rounded = str(dtype).removeprefix("torch.") in ("float16", "bfloat16")  # to other latents
    sidecars = None if is_rounded else weights.parent
    written, steps, place = _write(codec, out, to, dtypes, changes, former, sidecars)
    scale = asked or Scale(
        codec.latent_space.scaling_factor, component.config.get("shift_factor"), "the codec's own config"
    )
    if changes.fold_scale:
        scale = named_scale(changes.fold_scale)._replace(
            rule=f"of {changes.fold_scale}, folded into the weights"
        )
    return Conversion(
        source=f"diffusers {type(component).__name__}",
        keys={"mapped": len(component.state_dict())},
        scaling_factor=scale.scaling_factor,
        shift_factor=scale.shift_factor,
        scale_known_by=scale.rule,
        written=written,
        changes=steps,
        place=place,
    )


def _write(
    codec: "LatentCodec",
    out: Path,
    to: str | None,
    dtypes,
    changes: Changes,
    former: str | None,
    folder: Path | None = None,
) -> tuple[list[Path], tuple[str, ...], str | None]:
    """Change a codec's component as asked and write it.

    Args:
        to: None: what the host loads.
        former: text of the model card that is there.
        folder: the codec's, whose sidecars go along.

    Returns:
        The files, what was changed, and where they belong.
    """
    from latent_codec.conversion.writing import write_component, write_foreign

    export = prepare(codec.autoencoder, changes)
    row = export.row
    to = to or (row.format if row is not None else "diffusers")
    files = destination(out, to, export, codec.name, changes)
    if export.component is not codec.autoencoder and isinstance(dtypes, Mapping):
        # By keys, of which there are others now; a folded scale would be rounded to half.
        kinds = set(dtypes.values())
        dtypes = kinds.pop() if len(kinds) == 1 and not changes.fold_scale else None
    if to == "diffusers":

        def finish(new: Path) -> None:
            kept = keep_sidecars(folder, codec, new, out.name) if folder is not None else []
            text = card(codec.name, changes, export, kept, former) if changes else former
            if text is not None:
                (new / "README.md").write_text(text, encoding="utf-8")

        write_component(export.component, out, dtypes=dtypes, pipeline=codec.pipeline, finish=finish)
    else:
        write_foreign(export.component, to, files, dtypes=dtypes, metadata=names_of(codec))
    place = None
    if row is not None and row.place:
        place = f"{row.version} looks for {'them' if len(files) > 1 else 'it'} in {row.place}"
    return files, export.steps, place


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
