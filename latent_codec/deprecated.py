"""Names of version 0.1 that 0.2 has changed. Each works until 0.3, and warns of its new name.

import latent_codec.pictures              a module that moved           MODULES
latent_codec.PictureClassifier            a class, function, constant   NAMES
reconstruction.read_image                 one that moved                MOVED
codec.space                               an attribute                  attribute()
run.calibration_pictures = 16             a setting of a run            SETTINGS
latent-codec info --images DATA           a flag                        FLAGS
{"_class_name": "PictureClassifier"}      a config on disk (no warning) CLASS_NAMES
"pictures_per_second": 24.1               a line of metrics (likewise)  RECORDS
"""

import argparse
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

REMOVAL = "latent-codec 0.3"

MODULES = {
    "latent_codec.codec_folders": "latent_codec.components.codec_folders",
    "latent_codec.encoded_pictures": "latent_codec.latents.encoded_images",
    "latent_codec.latent_files": "latent_codec.latents.latent_files",
    "latent_codec.latent_space": "latent_codec.families.latent_space",
    "latent_codec.picture_decoding": "latent_codec.images.decoding",
    "latent_codec.picture_labels": "latent_codec.images.labels",
    "latent_codec.picture_sources": "latent_codec.images.sources",
    "latent_codec.pictures": "latent_codec.images.tensors",
    "latent_codec.prior_folders": "latent_codec.components.prior_folders",
    "latent_codec.conversion.converting": "latent_codec.converting",
    "latent_codec.bitstream.stored_entropy": "latent_codec.bitstream.entropy_model",
    "latent_codec.bitstream.whole_numbers": "latent_codec.bitstream.integer_inference",
    "latent_codec.evaluation.picture_formats": "latent_codec.evaluation.image_formats",
    "latent_codec.evaluation.rate_distortion_pictures": "latent_codec.evaluation.rate_distortion_images",
}

ELSEWHERE = {"find_images": "latent_codec.images.files", "SUFFIXES": "latent_codec.images.files"}
"""Names of today that left the module that took the rest."""

MOVED = {
    "latent_codec.conversion.Conversion": "latent_codec.converting:Conversion",
    "latent_codec.conversion.convert": "latent_codec.converting:convert",
    "latent_codec.evaluation.reconstruction.read_image": "latent_codec.images.sources:ImageSource.image",
    "latent_codec.training.labelled_data.SomeImages": "latent_codec.images.sources:SomeImages",
}
"""Names that left a module that stays; its `__getattr__` is `find_name`."""

NAMES = {
    "DatasetPictures": "DatasetImages",
    "EncodedPictures": "EncodedImages",
    "FolderPictures": "FolderImages",
    "IdxPictures": "IdxImages",
    "Picture": "ImageLike",
    "PictureClassifier": "ImageClassifier",
    "PictureError": "ImageError",
    "PictureFigures": "ImageFigures",
    "PictureFormat": "ImageFormat",
    "PictureSource": "ImageSource",
    "PreparedPicture": "PreparedImage",
    "TarPictures": "TarImages",
    "StoredEntropy": "EntropyModel",
    "WholeNumberLayer": "IntegerLayer",
    "WholeNumberLinear": "IntegerLinear",
    "WholeNumberMLP": "IntegerMLP",
    "WholeNumberNetwork": "IntegerNetwork",
    "codebook_picture": "codebook_image",
    "comparison_picture": "comparison_image",
    "draw_chances": "draw_uniforms",
    "find_pictures": "find_images",
    "hstack_pictures": "hstack_images",
    "median_picture": "median_image",
    "picture_formats": "image_formats",
    "picture_grid": "image_grid",
    "picture_size": "image_size",
    "read_picture": "read_image",
    "write_picture": "write_image",
}

SETTINGS = {"run.calibration_pictures": "run.calibration_images"}

FLAGS = {
    "encode": {"--mirrored": "--flip"},
    "info": {"--pictures": "--data", "--images": "--data", "--num": "--limit"},
    "fit-preview": {"--pictures": "DATA", "--images": "DATA"},
}
"""Of each verb; what is written in capitals is given without a flag."""

CLASS_NAMES = {"PictureClassifier": "ImageClassifier"}

RECORDS = {
    "num_pictures": "num_images",
    "pictures_per_second": "images_per_second",
    "pictures_per_step": "images_per_step",
}


def warn(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Say once per place that `old` is now `new`."""
    warnings.warn(
        f"{old} is now {new}; the old name goes with {REMOVAL}", DeprecationWarning, stacklevel=stacklevel
    )


def find_name(module: str, name: str) -> Any:
    """What an old `name` of `module` is today, for the module's `__getattr__`.

    Raises:
        AttributeError: if `module` never had that name.
    """
    if place := MOVED.get(f"{module}.{name}"):
        warn(f"{module}.{name}", place.replace(":", "."), stacklevel=4)
        return resolve_name(place)
    new = NAMES.get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    found = getattr(sys.modules[module], new)
    warn(f"{module}.{name}", f"{module}.{new}", stacklevel=4)
    return found


def attribute(old: str, new: str) -> property:
    """A property for the attribute `old` of a class that now calls it `new`."""

    def get(self):
        warn(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    def set_(self, value):
        warn(f"{type(self).__name__}.{old}", new)
        setattr(self, new, value)

    return property(get, set_, doc=f"Deprecated: `{new}`.")


def rename_settings(table: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, by section, under the names of today; values that name a class, too."""
    table = {
        section: dict(values) if isinstance(values, dict) else values for section, values in table.items()
    }
    for old, new in SETTINGS.items():
        section, key = old.split(".")
        values = table.get(section)
        if isinstance(values, dict) and key in values:
            warn(old, new)
            values.setdefault(new.partition(".")[2], values.pop(key))
    model = table.get("model")
    if isinstance(model, dict) and isinstance(model.get("class_name"), str):
        model["class_name"] = CLASS_NAMES.get(model["class_name"], model["class_name"])
    return table


def rename_class(config: dict[str, Any]) -> dict[str, Any]:
    """A component's config with the name that its class has today."""
    name = config["_class_name"]
    return config | {"_class_name": CLASS_NAMES.get(name, name)}


def rename_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics or the state of a checkpoint under today's names."""
    return {RECORDS.get(name, name): value for name, value in record.items()}


def ideal_bits(decoded, entropy_model=None) -> float:
    """`latent_codec.bitstream.ideal_bits` of version 0.1."""
    warn("latent_codec.bitstream.ideal_bits(decoded)", "decoded.code_length")
    return decoded.code_length


def add_old_flags(parser: argparse.ArgumentParser, verb: str) -> None:
    """Let the parser of a verb take the old names of its flags, hidden from its help."""
    for flag, new in FLAGS.get(verb, {}).items():
        (action,) = (each for each in parser._actions if new in (*each.option_strings, each.metavar))
        parser.add_argument(
            flag,
            dest=action.dest,
            action=_OldFlag,
            new=new,
            nargs="+" if action.nargs == "*" else action.nargs,
            const=action.const,
            type=action.type,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


class _OldFlag(argparse.Action):
    """Stores the value of the flag that is called `new` today."""

    def __init__(self, *args: Any, new: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.new = new

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"Note: {option_string} is now {self.new}; the old name goes with {REMOVAL}", file=sys.stderr)
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


class _OldModules:
    """Finds a module under its old path: an import of it succeeds, and names come from where they are now."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, _OldModules) if name in MODULES else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name, f"Deprecated: {MODULES[spec.name]}.")

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        new = MODULES[module.__name__]
        warn(module.__name__, new, stacklevel=6)

        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            today = NAMES.get(name, name)
            found = import_module(new)
            if not hasattr(found, today) and today in ELSEWHERE:
                found = import_module(ELSEWHERE[today])
            return getattr(found, today)

        module.__getattr__ = find


def install() -> None:
    """Make the old module paths importable."""
    if not any(finder is _OldModules for finder in sys.meta_path):
        sys.meta_path.append(_OldModules)


def evaluate_codec(codec, source, **options):
    """`evaluate` of today, which takes the images first."""
    from latent_codec.evaluation.reconstruction import evaluate

    warn("evaluate_codec(codec, source)", "evaluate(source, codec)")
    return evaluate(source, codec, **options)
