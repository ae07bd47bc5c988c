"""Codes computed once are those of LatentCodec, in order, with names and labels, however often the run was stopped."""

import io
import json
import os
import pickle

import diffusers
import numpy as np
import pytest
import torch
from helpers.commands import files_in, write_idx, write_tar
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from latent_codec import AutoencoderVQ, HierarchicalVQ, LatentCodec
from latent_codec.images.sources import LabelError, open_source
from latent_codec.latents.encoded_images import encode_source, open_encoded
from latent_codec.latents.latent_files import load_latents, save_indices, save_latents

BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def kl_codec(name="mine", seed=0):
    torch.manual_seed(seed)
    return LatentCodec(diffusers.AutoencoderKL(in_channels=1, out_channels=1, **BLOCKS), name=name)


def vq_codec(name="codes", seed=0):
    """Its codewords lie among what the encoder gives, so that images use several of them."""
    torch.manual_seed(seed)
    model = AutoencoderVQ(in_channels=1, out_channels=1, num_vq_embeddings=300, **BLOCKS)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
        model.encoder.conv_out.weight.mul_(5)
    return LatentCodec(model, name=name)


def hierarchical_codec():
    torch.manual_seed(1)
    model = HierarchicalVQ(
        in_channels=1,
        strides=(4, 2),
        codebook_sizes=(64, 64),
        hidden_channels=8,
        residual_channels=4,
        embed_dim=4,
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        for quantizer in model.quantizers:
            quantizer.embedding.weight.normal_()
    return LatentCodec(model, name="levels")


def pixels(index: int, height=16, width=16) -> np.ndarray:
    """Noise in a corner of its own brightness, so that coarse grids tell images apart too."""
    noise = np.random.default_rng(index).integers(0, 64, (height, width), np.uint8)
    noise[: height // 2, : width // 2] += np.uint8(index * 83 % 192)
    return noise


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def idx(tmp_path):
    """An IDX folder of seven images with the labels 0, 10, 20 ..."""
    folder = tmp_path / "idx"
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte", np.stack([pixels(index) for index in range(7)]))
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(0, 70, 10, dtype=np.uint8))
    return open_source(folder)


@pytest.fixture
def photos(tmp_path):
    """A folder of five PNGs in two classes, sizes 16x16, 16x16, 9x13, 16x16, 9x13."""
    for number, (kind, size) in enumerate(
        [("cat", (16, 16)), ("cat", (16, 16)), ("cat", (9, 13)), ("dog", (16, 16)), ("dog", (9, 13))]
    ):
        path = tmp_path / "photos" / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels(number, *size)))
    return tmp_path / "photos"


def image(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).float()[None] / 127.5 - 1


def assert_same_content(one, other):
    """Not to the byte: safetensors writes metadata in any order."""
    one, other = load_latents(one), load_latents(other)
    assert (one.names, one.sizes, one.labels) == (other.names, other.sizes, other.labels)
    for grids, others in zip(one.indices, other.indices, strict=True):
        assert all(torch.equal(*pair) for pair in zip(grids, others, strict=True))


def mtimes(files):
    return [file.stat().st_mtime_ns for file in files]


@pytest.mark.parametrize("build", [vq_codec, hierarchical_codec])
def test_indices_are_those_of_the_codec(build, idx, tmp_path):
    codec = build()
    files = encode_source(codec, idx, tmp_path / "codes", images_per_file=3, batch_size=2)
    assert [file.parent for file in files] == [tmp_path / "codes/shards"] * 3
    assert [file.name[:6] for file in files] == ["00000-", "00001-", "00002-"]

    encoded = open_encoded(tmp_path / "codes", codec=codec)
    assert len(encoded) == 7 and encoded.is_discrete
    assert (encoded.codec_name, encoded.space_fingerprint) == (codec.name, codec.space_fingerprint)
    for index in (6, 0, 3, 2, 1, 5, 4):
        grids, expected = encoded.indices(index), codec.encode_indices(image(pixels(index)))
        assert all(grid.dtype == torch.int64 for grid in grids)
        assert all(torch.equal(grid, each[0]) for grid, each in zip(grids, expected, strict=True))
        assert encoded.label(index) == 10 * index
        assert encoded.name(index) == f"train-{index:05d}"
    for grids in zip(*map(encoded.indices, range(7)), strict=True):
        assert len(torch.stack(grids).unique()) > 3  # else these images would tell little
    with pytest.raises(ValueError, match=r"indices of \w+, not latents; use indices"):
        encoded.latents(0)


def test_latents_are_those_of_the_codec(idx, tmp_path):
    codec = kl_codec()
    encode_source(codec, idx, tmp_path / "codes", images_per_file=4)
    encoded = open_encoded(tmp_path / "codes", codec=codec)
    assert not encoded.is_discrete
    for index in range(7):
        latents = encoded.latents(index)
        # Convolutions of a batch may round otherwise than those of one image.
        torch.testing.assert_close(latents, codec.encode(image(pixels(index)))[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="latents of mine, not indices; use latents"):
        encoded.indices(0)


def test_latents_of_a_codec_with_a_codebook_on_request(idx, tmp_path):
    codec = vq_codec()
    encode_source(codec, idx, tmp_path / "codes", indices=False)
    expected = codec.encode(image(pixels(2)))[0]
    # As above: a batch may round otherwise.
    torch.testing.assert_close(open_encoded(tmp_path / "codes").latents(2), expected, atol=1e-5, rtol=1e-5)

    with pytest.raises(ValueError, match="mine has no codebook"):
        encode_source(kl_codec(), idx, tmp_path / "other", indices=True)


def test_stored_half_precision_is_given_as_float32(tmp_path):
    latents = torch.randn(2, 4, 3, 3).bfloat16()
    save_latents(tmp_path / "a.safetensors", latents, codec=kl_codec(), names="ab", sizes=[(6, 6)] * 2)
    given = open_encoded(tmp_path / "a.safetensors").latents(1)
    assert given.dtype == torch.float32 and torch.equal(given, latents[1].float())


def test_what_is_given_is_the_callers_own(idx, tmp_path):
    for name, codec in (("a", vq_codec()), ("b", kl_codec())):
        encode_source(codec, idx, tmp_path / name)
    discrete, continuous = open_encoded(tmp_path / "a"), open_encoded(tmp_path / "b")
    before = discrete.indices(0)[0], continuous.latents(0)
    discrete.indices(0)[0].fill_(0)
    continuous.latents(0).fill_(0)
    assert torch.equal(discrete.indices(0)[0], before[0]) and before[0].any()
    assert torch.equal(continuous.latents(0), before[1]) and before[1].any()


@pytest.mark.parametrize("largest", [255, 256, 32768, 2**31])
def test_indices_of_any_size_come_back(largest, tmp_path):
    """Each file has its own smallest type; together they keep every value."""
    small, large = torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[0, largest]]])
    for name, grid in (("a", small), ("b", large)):
        path = tmp_path / f"{name}.safetensors"
        save_indices(path, [grid], codec=vq_codec(), names=[name], sizes=[(4, 4)])
    encoded = open_encoded(tmp_path)
    assert torch.equal(encoded.indices(0)[0], small[0])
    assert torch.equal(encoded.indices(1)[0], large[0])


def test_images_of_one_folder_may_differ_in_size(photos, tmp_path):
    codec = hierarchical_codec()
    encode_source(codec, open_source(photos), tmp_path / "codes", images_per_file=4, batch_size=8)
    encoded = open_encoded(tmp_path / "codes")
    assert [encoded.name(index) for index in range(5)] == [
        "cat/0.png",
        "cat/1.png",
        "cat/2.png",
        "dog/3.png",
        "dog/4.png",
    ]
    assert [encoded.label(index) for index in range(5)] == [0, 0, 0, 1, 1]
    for index in range(5):
        expected = codec.encode_indices(photos / encoded.name(index))
        assert all(torch.equal(a, b[0]) for a, b in zip(encoded.indices(index), expected, strict=True))
    files = sorted((tmp_path / "codes/shards").glob("*.safetensors"))
    sizes = [size for file in files for size in load_latents(file).sizes]
    assert sizes == [(16, 16), (16, 16), (9, 13), (16, 16), (9, 13)]


def test_tar_with_labels_of_either_kind(tmp_path):
    members = {}
    for index, (suffix, label) in enumerate([("json", b'{"smiling": true}'), ("cls", b"5"), (None, b"")]):
        members[f"{index}.png"] = png(pixels(index))
        if suffix:
            members[f"{index}.{suffix}"] = label
    write_tar(tmp_path / "photos.tar", members)
    encode_source(vq_codec(), open_source(tmp_path / "photos.tar"), tmp_path / "codes")
    encoded = open_encoded(tmp_path / "codes")
    assert [encoded.label(index) for index in range(3)] == [{"smiling": True}, 5, None]
    assert encoded.name(1) == "photos.tar/1.png"


@pytest.mark.parametrize("build", [vq_codec, kl_codec])
def test_mirrored_images_follow_their_images(build, photos, tmp_path):
    codec = build()
    files = encode_source(
        codec, open_source(photos), tmp_path / "codes", images_per_file=2, batch_size=3, mirrored=True
    )
    encoded = open_encoded(tmp_path / "codes")
    assert len(encoded) == 10
    for index in range(5):
        name = encoded.name(2 * index)
        assert encoded.name(2 * index + 1) == f"{name} (mirrored)"
        assert encoded.label(2 * index) == encoded.label(2 * index + 1) == (index > 2)
        pixels = np.asarray(Image.open(photos / name))
        for place, array in ((2 * index, pixels), (2 * index + 1, pixels[:, ::-1])):
            if encoded.is_discrete:
                assert torch.equal(encoded.indices(place)[0], codec.encode_indices(image(array))[0][0])
            else:  # a batch may round otherwise than one image
                expected = codec.encode(image(array))[0]
                torch.testing.assert_close(encoded.latents(place), expected, atol=1e-5, rtol=1e-5)
    assert len(load_latents(files[0]).names) == 4


def test_killed_run_goes_on_where_it_was(idx, tmp_path):
    codec, folder = vq_codec(), tmp_path / "codes"
    whole = encode_source(codec, idx, tmp_path / "whole", images_per_file=3)

    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_source(codec, idx, folder, images_per_file=3, batch_size=1, on_progress=interrupt)
    # Nothing half-written is next to it, and there is no index, without which this is no data set.
    assert [path.name for path in folder.iterdir()] == ["shards"]
    finished = folder / "shards" / whole[0].name
    assert sorted((folder / "shards").iterdir()) == [finished.with_suffix(".json"), finished]
    os.utime(finished, ns=(10**18, 10**18))
    # What a run that is killed outright may leave behind is never taken for a shard.
    (folder / "shards" / whole[1].name).write_bytes(b"half")

    seen = []
    files = encode_source(codec, idx, folder, images_per_file=3, on_progress=lambda *done: seen.append(done))
    assert mtimes(files[:1]) == [10**18]
    for file, other in zip(files, whole, strict=True):
        assert_same_content(file, other)
    assert seen[0] == (3, 7) and seen[-1] == (7, 7)
    assert len(open_encoded(folder)) == 7


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty"])
def test_only_missing_and_damaged_files_are_written_again(damage, idx, tmp_path, caplog):
    codec = vq_codec()
    files = encode_source(codec, idx, tmp_path / "codes", images_per_file=3, mirrored=True)
    whole = files[1].rename(tmp_path / "whole.safetensors")
    if damage != "delete":
        files[1].write_bytes(whole.read_bytes()[:-10] if damage == "truncate" else b"")
    for file in (files[0], files[2]):
        os.utime(file, ns=(10**18, 10**18))

    assert encode_source(codec, idx, tmp_path / "codes", images_per_file=3, mirrored=True) == files
    assert mtimes([files[0], files[2]]) == [10**18] * 2
    assert_same_content(files[1], whole)
    assert ("written anew" in caplog.text) == (damage != "delete")


def test_data_that_has_grown_keeps_the_shards_whose_images_are_the_same(photos, tmp_path):
    codec = vq_codec()
    files = encode_source(codec, open_source(photos), tmp_path / "codes", images_per_file=3)
    os.utime(files[0], ns=(10**18, 10**18))
    (photos / "dog" / "9.png").write_bytes(png(pixels(9)))
    grown = encode_source(codec, open_source(photos), tmp_path / "codes", images_per_file=3)
    assert grown[0] == files[0] and mtimes(files[:1]) == [10**18]
    assert not set(files[1:]) & set(grown[1:])  # another listing makes another shard
    assert load_latents(grown[1]).names == ["dog/3.png", "dog/4.png", "dog/9.png"]
    assert [open_encoded(tmp_path / "codes").name(index) for index in (3, 4, 5)] == load_latents(
        grown[1]
    ).names


def test_unreadable_images_are_left_out_and_named(photos, tmp_path, caplog):
    codec = vq_codec()
    (photos / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for number in (3, 4):
        (photos / "dog" / f"{number}.png").write_bytes(b"")
    files = encode_source(codec, open_source(photos), tmp_path / "codes", images_per_file=3)
    assert [file.name[:6] for file in files] == ["00000-"]  # of the second one nothing can be read
    assert load_latents(files[0]).names == ["cat/0.png", "cat/2.png"]
    assert caplog.text.count("skipped: ") == 3 and "1.png: damaged or cut short" in caplog.text

    os.utime(files[0], ns=(10**18, 10**18))
    encode_source(codec, open_source(photos), tmp_path / "codes", images_per_file=3)
    assert mtimes(files) == [10**18]  # complete, as far as that is possible

    (photos / "cat" / "1.png").write_bytes(png(pixels(1)))  # repaired
    encode_source(codec, open_source(photos), tmp_path / "codes", images_per_file=3)
    assert load_latents(files[0]).names == ["cat/0.png", "cat/1.png", "cat/2.png"]


@pytest.mark.parametrize(
    "kind, label", [("json", b"{"), ("cls", b"cat"), ("cls", b""), ("cls", b"\xff"), ("json", b"[" * 100_000)]
)
def test_label_that_cannot_be_read_is_no_fault_of_its_image(kind, label, tmp_path, capsys):
    members = {"0.png": png(pixels(0)), f"0.{kind}": label, "1.png": png(pixels(1)), f"1.{kind}": b"{}"}
    write_tar(tmp_path / "photos.tar", members)
    source, codec = open_source(tmp_path / "photos.tar"), vq_codec()
    with pytest.raises(LabelError, match=rf"photos\.tar/0\.png: its \.{kind} label cannot be read"):
        encode_source(codec, source, tmp_path / "codes")
    assert not list(tmp_path.glob("codes/*")) and capsys.readouterr().err == ""
    (file,) = encode_source(codec, source, tmp_path / "codes", labels=False)
    assert load_latents(file).names == ["photos.tar/0.png", "photos.tar/1.png"]


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 images can be read, the first is .*a\.png"):
        encode_source(vq_codec(), open_source(tmp_path), tmp_path / "codes")


def test_files_of_another_encoding_are_never_overwritten(idx, tmp_path):
    codec, folder = vq_codec(), tmp_path / "codes"
    encode_source(codec, idx, folder, images_per_file=3, mirrored=True)
    before = files_in(folder)
    theirs = vq_codec("theirs", seed=1)
    for message, arguments in (
        (
            rf"indices of codes \(space {codec.space_fingerprint}\), not indices of theirs \(space {theirs.space_fingerprint}\)",
            {"codec": theirs},
        ),
        ("holds indices of codes .*, not latents of codes", {"indices": False}),
        (
            "codes .*, flip True, not indices of codes .*, flip False; give another folder",
            {"mirrored": False},
        ),
        ("images_per_shard 3, not .* images_per_shard 4", {"images_per_file": 4}),
    ):
        arguments = {"codec": codec, "source": idx, "images_per_file": 3, "mirrored": True} | arguments
        with pytest.raises(ValueError, match=message):
            encode_source(folder=folder, **arguments)
    assert files_in(folder) == before


@pytest.mark.parametrize("arguments", [{"images_per_file": 0}, {"batch_size": 0}])
def test_numbers_below_one_are_refused(arguments, idx, tmp_path):
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        encode_source(vq_codec(), idx, tmp_path / "codes", **arguments)


def test_another_codec_is_refused_naming_both(idx, tmp_path):
    codec, other = vq_codec("mine"), vq_codec("theirs", seed=1)
    encode_source(codec, idx, tmp_path / "codes")
    with pytest.raises(ValueError) as caught:
        open_encoded(tmp_path / "codes", codec=other)
    for part in ("indices of mine", codec.space_fingerprint, "not of theirs", other.space_fingerprint):
        assert part in str(caught.value)

    encode_source(other, idx, tmp_path / "others")
    with pytest.raises(ValueError, match=r"is of mine \(space .* is of theirs|of mine .* of theirs"):
        open_encoded([tmp_path / "codes", tmp_path / "others"])


def test_another_decoder_is_warned_of_once(idx, tmp_path):
    encode_source(kl_codec(), idx, tmp_path / "codes", images_per_file=2)
    tuned = kl_codec("tuned")
    with torch.no_grad():
        tuned.autoencoder.decoder.conv_out.bias.add_(0.1)
    with pytest.warns(UserWarning, match="tuned .* decoder of its own") as caught:
        open_encoded(tmp_path / "codes", codec=tuned)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_kinds_and_numbers_of_levels_are_not_mixed(tmp_path):
    codec, facts = vq_codec(), {"names": ["a"], "sizes": [(8, 8)]}
    grid = torch.zeros(1, 4, 4, dtype=torch.int64)
    save_indices(tmp_path / "a.safetensors", [grid], codec=codec, **facts)
    save_indices(tmp_path / "b.safetensors", [grid, grid], codec=codec, **facts)
    save_latents(tmp_path / "c.safetensors", torch.zeros(1, 4, 4, 4), codec=codec, **facts)
    with pytest.raises(
        ValueError, match=r"a\.safetensors holds 1 levels of indices .*c\.safetensors latents"
    ):
        open_encoded([tmp_path / "a.safetensors", tmp_path / "c.safetensors"])
    with pytest.raises(ValueError, match=r"a\.safetensors holds 1 levels of indices .*b\.safetensors 2"):
        open_encoded([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_damaged_missing_and_foreign_files(idx, tmp_path):
    files = encode_source(vq_codec(), idx, tmp_path / "codes", images_per_file=3)
    with safe_open(files[0], framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    whole = files[1].read_bytes()

    files[1].write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"00001-\w+\.safetensors is no latent file, or a truncated one"):
        open_encoded(tmp_path / "codes")
    files[1].write_bytes(whole)

    tensors["indices.1.0"] = tensors["indices.1.0"] - 1000
    save_file(tensors, files[0], metadata)
    with pytest.raises(ValueError, match=r"00000-\w+\.safetensors is damaged: an index is -"):
        open_encoded(tmp_path / "codes")

    save_file({"weight": torch.zeros(1)}, files[0])
    with pytest.raises(ValueError, match="not a latent file"):
        open_encoded(tmp_path / "codes")

    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"no latent files .* in .*bare; `latent-codec encode` writes them"):
        open_encoded(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no latent files .* in an empty list"):
        open_encoded([])
    with pytest.raises(FileNotFoundError):
        open_encoded(tmp_path / "nowhere.safetensors")


def test_single_files_and_folders_are_joined_in_order(idx, tmp_path):
    files = encode_source(vq_codec(), idx, tmp_path / "codes", images_per_file=3)
    encoded = open_encoded([files[2], tmp_path / "codes", str(files[1])])
    numbers = [int(encoded.name(index).removeprefix("train-")) for index in range(len(encoded))]
    assert numbers == [6, *range(7), 3, 4, 5]


def test_travels_to_the_workers_of_a_data_loader(idx, tmp_path):
    encode_source(vq_codec(), idx, tmp_path / "codes")
    encoded = open_encoded(tmp_path / "codes")
    copy = pickle.loads(pickle.dumps(encoded))
    assert all(torch.equal(copy.indices(i)[0], encoded.indices(i)[0]) for i in range(7))
    with pytest.raises(IndexError):
        encoded.indices(7)


def test_date_in_a_label_is_stored_as_text(tmp_path):
    import datetime

    import datasets

    rows = {
        "image": [{"bytes": png(pixels(0)), "path": None}],
        "taken": [datetime.datetime(2021, 5, 4)],
        "stars": [4],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "taken": datasets.Value("timestamp[s]"), "stars": datasets.Value("int64")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    encode_source(vq_codec(), open_source(tmp_path / "saved"), tmp_path / "codes")
    label = open_encoded(tmp_path / "codes").label(0)
    assert label == {"taken": "2021-05-04 00:00:00", "stars": 4}
    json.dumps(label)
