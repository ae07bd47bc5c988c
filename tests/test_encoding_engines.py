"""The engine accelerate in two processes, and what the engine ray needs; tests/test_ray_engine.py runs that one."""

import json
import pickle
import sys

import pytest
from helpers.commands import fails, files_in, write_tar
from helpers.encoding import small_codec, write_photos
from helpers.processes import COMMAND, run_forked, run_two

from latent_codec import LatentCodec
from latent_codec.images.image_source import ImageSource
from latent_codec.images.sources import SomeImages, open_source
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.plan import EncodingOptions, Shard, plan_shards
from latent_codec.latents.shards import encode_shard

IMAGES = 18


def encode(folder, out: str) -> list:
    """The command for `folder`'s photos."""
    words = ["encode", folder / "photos", "--codec", folder / "codec", "--format", "webdataset"]
    return [*words, "--shard", 2, "--num-workers", 0, "--out", folder / out]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`photos/`, of which one cannot be read, `codec/`, and `quiet/`, the data set that one undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("engines")
    write_photos(folder, IMAGES, [(32, 48), (40, 32)], digits=2)
    small_codec(8, 8).save_pretrained(folder / "codec")
    run_forked(COMMAND, *encode(folder, "quiet"), OMP_NUM_THREADS="1")
    return folder


def test_two_processes_of_accelerate_write_the_same_files(folder):
    words = [*encode(folder, "launched"), "--engine", "accelerate", "--json"]
    first = run_two(COMMAND, *words, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert files_in(folder / "launched") == files_in(folder / "quiet")
    counts = json.loads(first.stdout.splitlines()[-1])
    assert (counts["event"], counts["images"], counts["total"]) == ("done", IMAGES - 1, IMAGES)
    assert list(counts["failures"].values()) == [1]


@pytest.mark.parametrize("kind", ["folder", "tars", "some"])
def test_a_part_of_a_source_makes_the_same_shard_and_is_light(folder, tmp_path, kind):
    """What a worker of Ray gets in place of a listing."""
    source: ImageSource = open_source(folder / "photos")
    if kind != "folder":
        png = (folder / "photos" / "00.png").read_bytes()
        for tar in range(3):
            members = {
                f"{tar}{number}.{suffix}": content
                for number in range(6)
                for suffix, content in (("png", png), ("cls", b"3"), ("txt", f"photo {number}".encode()))
            }
            write_tar(tmp_path / f"{tar}.tar", members)
        source = open_source(tmp_path)
    if kind == "some":
        source = SomeImages(source, range(1, IMAGES))
    codec = LatentCodec.from_pretrained(folder / "codec")
    options = EncodingOptions(container="webdataset", images_per_shard=8)
    shard = plan_shards(source, options, codec)[1]
    part = pickle.loads(pickle.dumps(source.part(shard.numbers)))
    alone = encode_shard(codec, part, Shard(shard.name, 0, len(part)), options)
    assert alone.content == encode_shard(codec, source, shard, options).content
    assert len(pickle.dumps(source.part([5]))) < len(pickle.dumps(source)) / 2


def test_ray_is_refused_where_it_cannot_work(folder, capsys, monkeypatch):
    words = encode(folder, "none")
    error = fails(capsys, *words[:-1], "memory://latents", "--engine", "ray")
    assert error.endswith(
        "--out: expected a folder or URL that the processes of Ray see, got 'memory://latents'\n"
    )
    error = fails(capsys, *words, "--engine", "ray", "--device", "mps")
    assert "--device: expected cpu or cuda, of which Ray gives each worker its own, got 'mps'" in error
    error = fails(capsys, *words, "--ray-address", "auto")
    assert error.endswith("--ray-address: expected none without Ray, got 'auto'; add --engine ray\n")
    error = fails(capsys, "encode", folder / "photos", "--engine", "ray")
    assert "--engine: expected none of images in a file each" in error
    monkeypatch.setitem(sys.modules, "ray", None)
    error = fails(capsys, *words, "--engine", "ray")
    assert error.endswith('the engine ray needs Ray Data: pip install "latent-codec[ray]"\n')


def test_an_engine_that_is_none_is_refused(folder):
    codec = LatentCodec.from_pretrained(folder / "codec")
    with pytest.raises(ValueError, match="engine: expected one of local, accelerate, ray, got 'spark'"):
        encode_data_set(codec, open_source(folder / "photos"), folder / "none", engine="spark")
