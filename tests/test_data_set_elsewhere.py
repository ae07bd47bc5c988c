"""webdataset and datasets read a data set of latents where this package is not imported, to equal latents, labels and captions."""

import json
from importlib.util import find_spec

import diffusers
import numpy as np
import torch
from helpers.commands import write_tar
from helpers.processes import run_forked
from test_data_set import BLOCKS, SIZES, photo

from latent_codec import LatentCodec, LatentDataset
from latent_codec.images.sources import open_source
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.plan import EncodingOptions

READ_TARS = """
import glob
import webdataset

samples = webdataset.WebDataset(sorted(glob.glob("webdataset/shards/*.tar")), shardshuffle=False).decode()
say("webdataset", [
    (each["json"]["name"], each["latents.npy"], each["cls"], each.get("txt"), each["json"]["size"]) for each in samples
])
"""
READ_TABLES = """
from datasets import load_dataset

rows = load_dataset("parquet", data_files="parquet/shards/*.parquet", split="train", cache_dir="cache")
say("parquet", [
    (row["name"], np.array(row["latents"], np.float16), row["label"], row["caption"], [row["height"], row["width"]])
    for row in rows
])
"""
SAY = """
import json, sys
import numpy as np

def say(container, rows):
    np.savez(f"{container}.npz", *(latents for _, latents, *_ in rows))
    with open(f"{container}.json", "w") as file:
        json.dump([[name, label, caption, size] for name, _, label, caption, size in rows], file)
"""


def test_other_libraries_read_equal_latents_without_this_package(tmp_path):
    torch.manual_seed(0)
    codec = LatentCodec(diffusers.AutoencoderKL(**BLOCKS))
    members = {f"{number}.png": photo(number) for number in range(len(SIZES))}
    members |= {f"{number}.cls": str(number).encode() for number in range(len(SIZES))}
    members |= {"0.txt": b"the first"}
    source = open_source(write_tar(tmp_path / "photos.tar", members))
    readers = {"webdataset": READ_TARS, "parquet": READ_TABLES}
    if find_spec("webdataset") is None:  # in the extra [test]
        del readers["webdataset"]
    for container in readers:
        options = EncodingOptions(container=container, dtype="float16", images_per_shard=5)
        encode_data_set(codec, source, tmp_path / container, options, num_workers=0)

    code = SAY + "".join(readers.values()) + "assert 'latent_codec' not in sys.modules\n"
    run_forked(code, cwd=tmp_path)
    for container in readers:
        dataset = LatentDataset(tmp_path / container, dtype=None)
        told = json.loads((tmp_path / f"{container}.json").read_text())
        with np.load(tmp_path / f"{container}.npz") as found:
            assert len(found.files) == len(dataset) == len(SIZES)
            for latents, (name, *facts), sample in zip(found.values(), told, dataset, strict=True):
                assert latents.dtype == np.float16 and np.array_equal(latents, sample["latents"].numpy())
                assert name == sample["name"]
                assert facts == [sample["label"], sample["caption"] or None, sample["size"].tolist()]
