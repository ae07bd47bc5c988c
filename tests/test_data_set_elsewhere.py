"""webdataset and datasets read a data set of latents where this package is not imported, to equal latents, labels and captions."""

import json
import subprocess
import sys
from importlib.util import find_spec

import diffusers
import numpy as np
import pytest
import torch
from helpers.commands import write_tar
from test_data_set import BLOCKS, SIZES, photo

from latent_codec import LatentCodec, LatentDataset
from latent_codec.images.sources import open_source
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.plan import EncodingOptions

READ_TARS = """
import glob, sys
import numpy as np, webdataset

found = {}
for sample in webdataset.WebDataset(sorted(glob.glob("tars/shards/*.tar")), shardshuffle=False).decode():
    facts = sample["json"]
    found[facts["name"]] = sample["latents.npy"]
    print(sample["__key__"], sample["cls"], sample.get("txt", ""), facts["size"], facts["flipped"], sep="|")
np.savez("tars.npz", **{name.replace("/", "|"): latents for name, latents in found.items()})
assert "latent_codec" not in sys.modules
"""
READ_TABLES = """
import sys
import numpy as np
from datasets import load_dataset

rows = load_dataset("parquet", data_files="tables/shards/*.parquet", split="train", cache_dir="cache")
found = {row["name"].replace("/", "|"): np.array(row["latents"], np.float16) for row in rows}
np.savez("tables.npz", **found)
for row in rows:
    print(row["key"], row["label"], row["caption"] or "", [row["height"], row["width"]], row["flipped"], sep="|")
assert "latent_codec" not in sys.modules
"""


@pytest.mark.parametrize(
    ("name", "container", "code", "package"),
    [("tars", "webdataset", READ_TARS, "webdataset"), ("tables", "parquet", READ_TABLES, "datasets")],
)
def test_other_libraries_read_equal_latents(name, container, code, package, tmp_path):
    if find_spec(package) is None:
        pytest.skip(f"needs {package}, as the extra [test] has it")
    torch.manual_seed(0)
    codec = LatentCodec(diffusers.AutoencoderKL(**BLOCKS))
    members = {f"{number}.png": photo(number) for number in range(len(SIZES))}
    members |= {f"{number}.cls": str(number).encode() for number in range(len(SIZES))}
    members |= {"0.txt": b"the first"}
    source = open_source(write_tar(tmp_path / "photos.tar", members))
    options = EncodingOptions(container=container, dtype="float16", images_per_shard=5)
    encode_data_set(codec, source, tmp_path / name, options, num_workers=0)

    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    dataset = LatentDataset(tmp_path / name, dtype=None)
    with np.load(tmp_path / f"{name}.npz") as found:
        assert len(found) == len(dataset) == len(SIZES)
        for sample in dataset:
            assert np.array_equal(found[sample["name"].replace("/", "|")], sample["latents"].numpy())
    lines = {line.split("|")[0]: line.split("|")[1:] for line in run.stdout.splitlines()}
    for sample in dataset:
        caption, size = sample["caption"], json.dumps(sample["size"].tolist())
        assert lines[sample["key"]] == [str(sample["label"]), caption, size, "False"]
