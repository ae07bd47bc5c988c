"""`latent-codec convert`."""

import argparse
import dataclasses
import sys
from importlib import import_module

from latent_codec.cli.progress import showing
from latent_codec.cli.work.printing import print_json
from latent_codec.converting import Conversion, convert


def run(args: argparse.Namespace) -> None:
    network = "to", "entry", "config", "norm_num_groups", "class_name"
    scale = "scale", "scaling_factor", "shift_factor", "calibrate"
    changes = "embed", "fold_scale", "host", "family"
    sources, out = args.source, args.out
    if out is None and len(sources) > 1:  # argparse takes all but an option for sources
        *sources, out = sources
    # torch only where it is asked for: what does not fit is refused without it
    dtype = args.dtype and getattr(import_module("torch"), args.dtype)
    with showing(f"converting {sources[0]}") as report:
        done = convert(
            sources,
            out,
            dtype=dtype,
            on_progress=report,
            **{name: getattr(args, name) for name in (*network, *scale, *changes)},
        )
    if args.json:
        print_json(dataclasses.asdict(done) | {"written": [*map(str, done.written)]})
    elif done.latent2rgb is not None:
        print_json(done.latent2rgb)
        for path in done.written:
            print(path, file=sys.stderr)
    else:
        _print(done)


def _print(done: Conversion) -> None:
    place = " in ".join(each for each in (done.prefix, done.wrapper) if each)
    print(done.source + (f" under {place}" if place else ""), file=sys.stderr)
    for name, count in done.keys.items():
        print(f"{count:6,} keys {name}", file=sys.stderr)
    shift = "" if done.shift_factor is None else f", shift_factor {done.shift_factor:g}"
    print(f"scaling_factor {done.scaling_factor:g}{shift}: {done.scale_known_by}", file=sys.stderr)
    if done.settings_known_by:
        print(f"settings that weights do not show: {done.settings_known_by}", file=sys.stderr)
    for change in done.changes:
        print(change, file=sys.stderr)
    for entry in done.averaged_weights:
        print(f"Note: averaged weights are in {entry}; --entry {entry} takes those", file=sys.stderr)
    for name in done.other_classes:
        print(f"Note: the file fits {name}, too; --class-name {name} builds that", file=sys.stderr)
    if done.place:
        print(done.place, file=sys.stderr)
    for path in done.written:
        print(path)
