"""`latent-codec translate`."""

import argparse
from pathlib import Path

from latent_codec.cli.progress import progress, showing
from latent_codec.cli.work.opening import device_of
from latent_codec.cli.work.printing import print_json
from latent_codec.components.loading import open_component
from latent_codec.latents.data_set import LatentDataset
from latent_codec.latents.latent_files import load_latents
from latent_codec.latents.translating import write_translated
from latent_codec.models.latent_translator import LatentTranslator


def run(args: argparse.Namespace) -> None:
    with showing(f"opening {args.translator}"):
        translator = open_component(args.translator, "translator", [LatentTranslator]).to(device_of(args))
    written: list[Path] = []
    num_images = 0
    for file, folder in progress(args.files, "translating"):
        is_set = file.is_dir()
        parts = LatentDataset(file, sample=False).latent_files() if is_set else [load_latents(file)]
        for found in parts:
            stem = Path(found.path.name).stem
            path = args.out / folder / (file.name if is_set else "") / f"{stem}.safetensors"
            write_translated(path, found, translator)
            written.append(path)
            num_images += len(found.names)
            if not args.json:
                print(path)
    if args.json:
        print_json(
            {
                "source": translator.config.source,
                "target": translator.config.target,
                "images": num_images,
                "files": list(map(str, written)),
            }
        )
