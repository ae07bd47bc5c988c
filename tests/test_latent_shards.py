"""Shards of a data set of latents: what is in them, that others read them, and that equal work gives equal bytes."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from helpers.commands import files_in, write_tar
from helpers.encoding import small_codec
from PIL import Image

from latent_codec.errors import SettingError
from latent_codec.images.buckets import Frame
from latent_codec.images.sources import open_source
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.latent_files import load_latents
from latent_codec.latents.plan import EncodingOptions, plan_shards
from latent_codec.latents.samples import Sample, batches
from latent_codec.latents.shards import encode_shard

SIZES = [(40, 32), (32, 32), (40, 32), (24, 48), (32, 32)]


@pytest.fixture(scope="module")
def codec():
    return small_codec(8, 8, name="tiny", scaling_factor=0.5, shift_factor=0.25)


def photo(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*SIZES[number], 3), np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tar of five images: captions, labels of both kinds, another member; the third cannot be read."""
    members = {}
    for number in range(5):
        key = f"sub/{number:03d}"
        members[f"{key}.png"] = b"\x89PNG\r\n\x1a\nhalf" if number == 2 else png(photo(number))
        members[f"{key}.txt"] = f"photo {number}".encode()
        if number == 0:
            members[f"{key}.json"] = b'{"stars": 5}'
        else:
            members[f"{key}.cls"] = str(number).encode()
        members[f"{key}.origin.json"] = b'{"from": "here"}'
    return open_source(write_tar(tmp_path_factory.mktemp("data") / "photos.tar", members))


def expected(codec, number: int) -> torch.Tensor:
    return codec.encode(photo(number))[0]


def encode(codec, source, folder, **options):
    index, _ = encode_data_set(codec, source, folder, EncodingOptions(**options))
    return index, [folder / "shards" / each["name"] for each in index["shards"]]


def test_webdataset_reads_the_tars(codec, source, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    index, files = encode(codec, source, tmp_path, container="webdataset", images_per_shard=3)
    assert (index["images"], index["samples"], index["skipped"]) == (4, 4, 1)
    found = list(webdataset.WebDataset(list(map(str, files)), shardshuffle=False).decode())
    assert [each["__key__"] for each in found] == ["sub/000", "sub/001", "sub/003", "sub/004"]
    for number, each in zip((0, 1, 3, 4), found, strict=True):
        # Convolutions of a batch may round otherwise than those of one image.
        torch.testing.assert_close(
            torch.from_numpy(each["latents.npy"]), expected(codec, number), atol=1e-5, rtol=1e-5
        )
        assert each["txt"] == f"photo {number}" and each["origin.json"] == {"from": "here"}
        facts = each["json"]
        assert facts["name"] == f"photos.tar/sub/{number:03d}.png" and tuple(facts["size"]) == SIZES[number]
        assert facts["label"] == ({"stars": 5} if number == 0 else number)
        assert each.get("cls") == (None if number == 0 else number)
    with tarfile.open(files[0]) as tar:
        assert all((each.mtime, each.uid, each.gid, each.uname) == (0, 0, 0, "") for each in tar)


def test_datasets_reads_the_parquet_files(codec, source, tmp_path):
    _, files = encode(codec, source, tmp_path / "out", container="parquet", images_per_shard=3)
    data = datasets.load_dataset(
        "parquet", data_files=list(map(str, files)), split="train", cache_dir=str(tmp_path / "cache")
    ).with_format("torch")
    assert len(data) == 4
    for number, row in zip((0, 1, 3, 4), data, strict=True):
        torch.testing.assert_close(row["latents"], expected(codec, number), atol=1e-5, rtol=1e-5)
        assert (int(row["height"]), int(row["width"])) == SIZES[number]
        assert row["caption"] == f"photo {number}" and row["key"] == f"sub/{number:03d}"
    row = data.with_format(None)[0]
    assert row["label"] is None and json.loads(row["attributes"]) == {"stars": 5}
    assert json.loads(row["extra"]) == {"origin.json": '{"from": "here"}'}
    assert data.with_format(None)[1]["label"] == 1


@pytest.mark.parametrize("container", ["webdataset", "parquet", "safetensors"])
def test_equal_work_gives_equal_bytes(container, codec, source, tmp_path):
    options = EncodingOptions(container=container, images_per_shard=2, flip=True, posterior="sample")
    for name, settings in (("one", {"num_workers": 0}), ("two", {"num_workers": 2})):
        encode_data_set(codec, source, tmp_path / name, options, batch_size=2, **settings)
    files = files_in(tmp_path / "one")
    assert files == files_in(tmp_path / "two") and len(files) == 7
    for shard in plan_shards(source, options, codec):
        encoded = encode_shard(codec, source, shard, options, batch_size=2)
        assert files[f"shards/{shard.name}{options.suffix}"] == encoded.content
        assert json.loads(files[f"shards/{shard.name}.json"]) == encoded.marker


def test_any_place_that_fsspec_opens(codec, source, tmp_path):
    import fsspec

    options = EncodingOptions(container="webdataset", images_per_shard=3)
    index, _ = encode_data_set(codec, source, tmp_path, options)
    again, _ = encode_data_set(codec, source, "memory://latents", options)
    assert index == again
    fs = fsspec.filesystem("memory")
    there = {path.removeprefix("/latents/"): fs.cat(path) for path in fs.find("/latents")}
    assert there == files_in(tmp_path)
    fs.rm_file(f"/latents/shards/{index['shards'][0]['name']}")  # as if a writer had not come to its end
    encode_data_set(codec, source, "memory://latents", options)
    assert {path.removeprefix("/latents/"): fs.cat(path) for path in fs.find("/latents")} == there


def test_safetensors_shards_are_latent_files(codec, source, tmp_path):
    _, (file,) = encode(codec, source, tmp_path)
    found = load_latents(file, codec=codec)
    assert found.names == [f"photos.tar/sub/{number:03d}.png" for number in (0, 1, 3, 4)]
    assert found.captions == [f"photo {number}" for number in (0, 1, 3, 4)]
    assert found.labels == [{"stars": 5}, 1, 3, 4]


def test_mean_and_log_variance_make_the_samples(codec, source, tmp_path):
    _, (file,) = encode(codec, source, tmp_path, container="parquet", posterior="both")
    row = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache")).with_format("torch")[1]
    torch.testing.assert_close(row["mean"], expected(codec, 1), atol=1e-5, rtol=1e-5)
    posterior = codec.posterior(photo(1))
    # (raw - shift) * scale has scale^2 times the variance.
    variance = posterior.var[0] * 0.5**2
    torch.testing.assert_close(row["logvar"].exp(), variance, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"container": "zip"}, "container: expected one of webdataset, parquet, safetensors, got 'zip'"),
        ({"posterior": "both"}, "posterior: expected mean or sample of safetensors, got 'both'"),
        ({"container": "parquet", "dtype": "bfloat16"}, "dtype: expected float32 or float16, which parquet"),
        ({"buckets": True}, "buckets: expected a size; add `size=512`"),
        ({"images_per_shard": 0}, "images_per_shard: expected at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(SettingError) as caught:
        EncodingOptions(**options)
    assert str(caught.value).startswith(message)


def test_batches_hold_samples_of_one_size_and_few_wait():
    def sample(number, height, width):
        frame = Frame((height, width), (0, 0, height, width))
        return Sample(
            number=number, version=0, name=str(number), key=str(number), original=(height, width), frame=frame
        )

    def numbers(samples, batch_size):
        return [[each.number for each in batch] for batch in batches(samples, batch_size)]

    small = [sample(number, 16, 16 + number % 2) for number in range(7)]
    assert numbers(small, 2) == [[0, 2], [1, 3], [4, 6], [5]]
    assert numbers(small, 8) == [[0, 2, 4, 6], [1, 3, 5]]
    large = [sample(number, 256, 512) for number in range(5)]  # each as large as two of 256x256
    assert numbers(large, 4) == [[0, 1], [2, 3], [4]] and numbers(large, 1) == [[0], [1], [2], [3], [4]]
    each_its_own = [sample(number, 256, 256 + number) for number in range(40)]
    assert numbers(each_its_own, 4) == [[number] for number in range(40)]
    taken = []
    next(batches((taken.append(each) or each for each in each_its_own), 4))
    assert len(taken) == 31  # whose pixels are those of eight batches of four at 256x256
