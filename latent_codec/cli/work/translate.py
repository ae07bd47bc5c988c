"""`latent-codec translate`."""

import argparse

from latent_codec.cli.progress import progress, showing
from latent_codec.cli.work.opening import device_of
from latent_codec.cli.work.printing import print_json
from latent_codec.components.loading import open_component
from latent_codec.latents.data_set import LatentDataset
from latent_codec.latents.latent_files import load_latents
from latent_codec.latents.translating import translate_data_set, translate_file
from latent_codec.models.latent_translator import LatentTranslator


def run(args: argparse.Namespace) -> None:
    with showing(f"opening {args.translator}"):
        translator = open_component(args.translator, "translator", [LatentTranslator]).to(device_of(args))
    written: list[str] = []
    num_images = 0
    for file, folder in progress(args.files, "translating"):
        if file.is_dir():
            path = args.out if len(args.files) == 1 else args.out / file.name
            with showing(f"translating {file}") as report:
                index = translate_data_set(LatentDataset(file, sample=False), path, translator, report)
            num_images += index["images"]
        else:
            path = args.out / folder / f"{file.stem}.safetensors"
            found = load_latents(file)
            translate_file(found, path, translator)
            num_images += len(found.names)
        written.append(str(path))
        if not args.json:
            print(path)
    if args.json:
        ends = {"source": translator.config.source, "target": translator.config.target}
        print_json({**ends, "images": num_images, "files": written})
