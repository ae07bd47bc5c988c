"""A component made into what other programs load, and written as they want it: networks, scales, names, sidecars.

component --fold_scale--> --embed--> --host--> component that computes the same --write_component--> folder, with the
                                                                                                       sidecars that fit
                                                                                --write_foreign----> files, named for a host
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_codec.components.weight_files import check_folder_to_save
from latent_codec.conversion.checkpoints import SUFFIXES
from latent_codec.conversion.embedding import NETWORKS, as_network
from latent_codec.conversion.foreign import FORMATS
from latent_codec.conversion.hosts import HOSTS, TITLES, Row, row_for
from latent_codec.conversion.renaming import ConversionError, Scale, as_tuple
from latent_codec.conversion.scales import SCALES
from latent_codec.errors import SettingError

if TYPE_CHECKING:  # settings are checked before torch is imported
    from torch import nn

    from latent_codec.codec import LatentCodec

LATENT2RGB = "latent2rgb"
"""Value of `to` for the factors of a linear preview."""
FOREIGN = tuple(dict.fromkeys(name for each in FORMATS for name in each.names if name != "diffusers"))
"""Formats that `convert` writes, next to diffusers' own."""
HALVES = ("taesd",)
"""Formats of two files, for which a destination is a folder."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is to become of a component before it is written."""

    embed: str | None = None
    """Network to embed it in, of `NETWORKS`."""
    fold_scale: str | None = None
    """Family of denoisers whose scale is folded into the weights."""
    host: str | None = None
    """Program to write it for, of `HOSTS`."""
    family: str | None = None
    """Of the host's denoisers, for the names of files."""

    def __post_init__(self):
        for name, known in {"embed": NETWORKS, "fold_scale": SCALES, "host": HOSTS, "family": TITLES}.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise SettingError(name, f"one of {', '.join(known)}", value)
        if self.family is not None and self.host is None:
            raise SettingError(
                "family", "none without a host", self.family, advice="give `host`, too, or leave it out"
            )

    def __bool__(self) -> bool:
        return any((self.embed, self.fold_scale, self.host))


@dataclass(frozen=True, kw_only=True)
class Export:
    """A component as it is to be written, and what was done to it."""

    component: "nn.Module"
    steps: tuple[str, ...] = ()
    """What was changed, a phrase each; images and a denoiser's latents are the same."""
    row: Row | None = None
    """Of the host."""


def prepare(component: "nn.Module", changes: Changes) -> Export:
    """Fold, embed and fit a component as asked; it stays as it is.

    Raises:
        ConversionError: if it is no part of the network that is asked for, or the host loads no such component.
    """
    steps: list[str] = []
    if changes.fold_scale:
        from latent_codec.conversion.folding import check_foldable, fold_scale

        check_foldable(type(component).__name__)
        scale = Scale(*SCALES[changes.fold_scale], "folded")
        before, component = component, fold_scale(component, scale)
        steps += _differences(before, component)
        steps.append(
            f"the scale of {TITLES[changes.fold_scale]} folded into the weights: raw latents are others, latents the same"
        )
    if changes.embed:
        before, component = component, _embedded(component, NETWORKS[changes.embed])
        steps += _differences(before, component)
    row = None
    if changes.host == "diffusers":
        if component.config.get("shift_factor", 0.0) is None:
            component = _copy(component, shift_factor=0.0)
            steps.append("shift_factor 0.0 instead of none, which SD3's and FLUX's pipelines ask for")
    elif changes.host:
        row = _row(component, changes.host)
        if misfits := row.misfits(component.config):
            raise ConversionError(f"{row.version} builds another network than this one: {'; '.join(misfits)}")
        before, component = component, _fitted(component, row)
        steps += _differences(before, component)
    return Export(component=component, steps=tuple(steps), row=row)


def _row(component: "nn.Module", host: str) -> Row:
    from latent_codec.families import family_of

    name, channels = type(component).__name__, family_of(component).latent_space().raw_channels
    row = row_for(host, name, component.config, channels)
    if row is None:
        raise ConversionError(
            f"{HOSTS[host]} loads no {name} of {channels} latent channels; `latent-codec info CODEC --audit` says what it loads"
        )
    return row


def _embedded(component: "nn.Module", network: dict) -> "nn.Module":
    if type(component).__name__ != "AutoencoderKL":
        raise ConversionError(
            f"an AutoencoderKL is embedded in Stable Diffusion's network, and this is an {type(component).__name__}"
        )
    return as_network(component, network)


def _fitted(component: "nn.Module", row: Row) -> "nn.Module":
    changes = row.changes(component.config) if row.class_name == "AutoencoderKL" else {}
    return as_network(component, changes) if changes else component


def _copy(component: "nn.Module", **entries: Any) -> "nn.Module":
    """The component with other entries in its config, sharing its weights."""
    from latent_codec.conversion.renaming import Network

    copy = Network(type(component).__name__, component.config).on_meta()
    copy.load_state_dict(component.state_dict(), assign=True)
    copy.register_to_config(**entries)
    return copy.eval()


def _differences(before: "nn.Module", after: "nn.Module") -> Iterator[str]:
    """Phrases for entries of the config that say what the network is."""
    for key in sorted(after.config):
        if key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std") or key.startswith("_"):
            continue
        one, other = (as_tuple(each.config[key]) for each in (before, after))
        if one != other:
            yield f"{key} {_short(one)} as {_short(other)}"


def _short(value) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_destination(out: Path, to: str, host: str | None) -> None:
    """Refuse a destination that no file or folder of a format can have.

    Raises:
        SettingError: if the format is not known, or `out` is the name of a file where a folder is needed, or the other way round.
        ValueError: if a file exists, or a folder is no codec's.
    """
    is_file_name = out.suffix in SUFFIXES
    if to == "diffusers" and is_file_name:
        advice = f"name one, or say by `to` what the file is to hold ({', '.join(FOREIGN)})"
        expected = "the name of a folder, as a diffusers component is one"
        raise SettingError("out", expected, str(out), advice=advice)
    if to == "diffusers":
        check_folder_to_save(out)
    elif to not in FOREIGN:
        raise SettingError("to", f"one of diffusers, {', '.join(FOREIGN)}", to)
    elif to in HALVES and is_file_name:
        raise SettingError("out", f"the name of a folder for the two files of {to}", str(out))
    elif not (to in HALVES or is_file_name or host):
        raise SettingError("out", f"a file name that ends in one of {', '.join(SUFFIXES)}", str(out))
    elif out.exists() and not (host and out.is_dir()):
        raise ValueError(f"{out} exists; name a new file")


def destination(out: Path, to: str, export: Export, name: str, changes: Changes) -> list[Path]:
    """The files to write, or the one folder, by what a person named.

    Args:
        out: a folder; or a file, where the format has one.
        name: of the codec, for a file that may be called as anyone likes.

    Raises:
        SettingError, ValueError: as `check_destination`, and for a family that the format has not.
    """
    check_destination(out, to, changes.host)
    if to == "diffusers":
        return [out.resolve()]
    row = export.row
    suffix = row.suffix if row is not None else ".safetensors"
    if to in HALVES:
        stem = to if row is None else _stem(row, changes.family, export.component)
        files = [out / f"{stem}_{side}{suffix}" for side in ("encoder", "decoder")]
    else:
        files = [out if out.suffix in SUFFIXES else out / f"{name.replace('/', '-')}{suffix}"]
    for file in files:
        if file.exists():
            raise ValueError(f"{file} exists; name another destination")
    return files


def _stem(row: Row, family: str | None, component: "nn.Module") -> str:
    """What a host calls the two files of a tiny autoencoder, by the denoiser that they are for."""
    channels = component.config.latent_channels
    possible = row.families_of_names.get(channels, ())
    if family is None and len(possible) > 1:
        stems = " or ".join(f"{row.names[each]}_... for {TITLES[each]}" for each in possible)
        raise SettingError(
            "family",
            f"one of {', '.join(possible)}, for {row.version.host} finds a tiny autoencoder by its files' names: {stems}",
            advice=f"give `family={possible[0]}` or the like",
        )
    if family is not None and family not in possible:
        raise SettingError(
            "family", f"one of {', '.join(possible)}, whose latents have {channels} channels", family
        )
    return row.names[family or possible[0]]


def names_of(codec: "LatentCodec") -> dict[str, str]:
    """The metadata entry of a file that names the latent space of its latents."""
    return {"latent_space": json.dumps({"codec": codec.name, "space_fingerprint": codec.space_fingerprint})}


def keep_sidecars(source: Path, codec: "LatentCodec", folder: Path, name: str) -> list[str]:
    """Put the preview and the entropy model of a codec whose latents the component in `folder` has next to it.

    Both name the weights that they were fitted to, and name the new ones then.

    Args:
        source: the codec's folder.
        codec: of `source`.
        folder: a component's, which nobody reads yet.
        name: what messages will call it.

    Returns:
        Names of the files.
    """
    from latent_codec.bitstream.entropy_model import FILE_NAME
    from latent_codec.bitstream.sidecars import load_entropy_model
    from latent_codec.codec import LatentCodec
    from latent_codec.previews import preview_files

    preview, entropy = source / preview_files.NAME, source / FILE_NAME
    if not (preview.is_file() or entropy.is_file()):
        return []
    new = LatentCodec.from_pretrained(folder, pipeline=codec.pipeline)
    new.name = name
    kept = []
    with suppress(ValueError):  # of another codec, or of another pipeline's latents: it does not go along
        if preview.is_file():
            preview_files.write_preview(
                folder / preview.name, new, preview_files.read_preview(preview, codec)
            )
            kept.append(preview.name)
    with suppress(ValueError):
        if entropy.is_file():
            model = load_entropy_model(entropy, codec=codec)
            replace(model, space_fingerprint=new.space_fingerprint, codec_name=name).save(
                folder / entropy.name
            )
            kept.append(entropy.name)
    return kept


def latent2rgb(name_or_path: str | os.PathLike) -> dict[str, list]:
    """The linear preview of a codec as ComfyUI's Latent2RGB has it: a row of R, G, B per channel of latents, and the bias.

        rgb = latents @ latent_rgb_factors + latent_rgb_factors_bias, in [-1, 1]

    ComfyUI reads both from the class of a latent format, and has no file for them.

    Raises:
        ValueError: if the codec has no linear preview, or one that this cannot hold.
    """
    from latent_codec.codec import LatentCodec
    from latent_codec.previews.preview_files import preview_path, read_preview

    codec, path = LatentCodec.from_pretrained(name_or_path), preview_path(name_or_path)
    if not path.is_file():
        raise ValueError(f"{codec.name} has no preview; `latent-codec fit-preview` fits one")
    stored = read_preview(path, codec)
    if stored.weight.ndim == 4:
        raise ValueError(
            f"the preview of {codec.name} mixes 3x3 positions, and Latent2RGB takes each on its own; fit one of 1x1"
        )
    if codec.latent_space.packed:
        raise ValueError(f"latents of {codec.name} are packed, and Latent2RGB takes them as they are")
    return {
        "latent_rgb_factors": stored.weight.T.tolist(),
        "latent_rgb_factors_bias": stored.bias.tolist(),
    }


def card(title: str, changes: Changes, export: Export, kept: list[str], former: str | None) -> str:
    """The model card of a component that was changed: what was done, before the source's own card."""
    asked = ", ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(changes).items() if value is not None
    )
    steps = "".join(f"- {step}\n" for step in export.steps) or "- nothing: it is what is asked for\n"
    sidecars = f"\nPreview and entropy model went along: {', '.join(kept)}.\n" if kept else ""
    text = (
        f"# {title}\n\nMade from {title} by latent-codec ({asked}). Its latents and images are the same up to rounding; "
        f"the network is another:\n\n{steps}{sidecars}"
    )
    return text if former is None else f"{_front_matter(former)}{text}\n---\n\n{_body(former)}"


def _front_matter(text: str) -> str:
    """The YAML at the head of a model card, which has to stay there."""
    return text[: len(text) - len(_body(text))]


def _body(text: str) -> str:
    if not text.startswith("---\n") or "\n---\n" not in text[3:]:
        return text
    return text[text.index("\n---\n", 3) + 5 :]
