import json
import warnings

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from latent_codec import LatentCodec
from latent_codec.images.origins import GrayOrigin
from latent_codec.latents.latent_files import is_latent_file, load_latents, save_indices, save_latents

BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
SIZES = [(7, 9), (8, 8)]
NAMES = ["moon.jpg", "sun.png"]


def kl_codec(name="mine", seed=0, **config):
    torch.manual_seed(seed)
    return LatentCodec(diffusers.AutoencoderKL(**BLOCKS, **config), name=name)


@pytest.fixture
def codec():
    return kl_codec()


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, 4, 5, generator=generator), torch.randn(1, 4, 4, 4, generator=generator)]


@pytest.fixture
def stored(tmp_path, codec, latents):
    path = tmp_path / "moon.safetensors"
    save_latents(path, latents, codec=codec, names=NAMES, sizes=SIZES)
    return path


def test_latents_come_back_to_the_bit(stored, codec, latents):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_latents(stored, codec=codec)
    assert found.indices is None
    assert all(torch.equal(one, other) for one, other in zip(found.latents, latents, strict=True))
    assert (found.names, found.sizes, found.codec_name) == (NAMES, SIZES, "mine")
    assert [image.size for image in codec.decode(found.latents, size=found.sizes)] == [(9, 7), (8, 8)]


def test_file_is_plain_safetensors_with_a_key_per_image(stored, codec):
    with safe_open(stored, framework="pt") as file:
        assert sorted(file.keys()) == ["latents.0", "latents.1"]
        assert file.get_slice("latents.0").get_shape() == [4, 4, 5]
        metadata = file.metadata()
    assert metadata["space_fingerprint"] == codec.space_fingerprint
    assert metadata["fingerprint"] == codec.fingerprint
    assert json.loads(metadata["names"]) == NAMES
    assert json.loads(metadata["sizes"]) == [list(size) for size in SIZES]
    assert metadata["version"] == "1"


def test_labels_of_every_kind_come_back(tmp_path, codec, latents, stored):
    labels = [3, {"smiling": True, "hair": ["dark", None]}]
    grids = [torch.zeros(2, 3, 3, dtype=torch.int64)]
    path = tmp_path / "a.safetensors"
    for save, codes in ((save_latents, latents), (save_indices, grids)):
        save(path, codes, codec=codec, names=NAMES, sizes=SIZES, labels=labels)
        assert load_latents(path).labels == labels
        save(path, codes, codec=codec, names=NAMES, sizes=SIZES, labels=[None, 7])
        assert load_latents(path).labels == [None, 7]
    assert load_latents(stored).labels == [None, None]


def test_labels_leave_the_version_and_absent_ones_leave_nothing(tmp_path, codec, latents, stored):
    labeled, unlabeled = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_latents(labeled, latents, codec=codec, names=NAMES, sizes=SIZES, labels=[0, 1])
    save_latents(unlabeled, latents, codec=codec, names=NAMES, sizes=SIZES, labels=[None, None])
    metadata = []
    for path in (stored, unlabeled, labeled):
        with safe_open(path, framework="pt") as file:
            metadata.append(file.metadata())
    assert metadata[0] == metadata[1]
    assert metadata[2] == metadata[0] | {"labels": "[0, 1]"}


def test_origins_come_back_and_absent_ones_leave_nothing(tmp_path, codec, latents, stored):
    path = tmp_path / "a.safetensors"
    origins = [None, GrayOrigin(dtype="uint16", low=0, high=4095)]
    save_latents(path, latents, codec=codec, names=NAMES, sizes=SIZES, origins=origins)
    assert load_latents(path).origins == origins
    assert load_latents(stored).origins == [None, None]
    save_latents(path, latents, codec=codec, names=NAMES, sizes=SIZES, origins=[None, None])
    assert path.read_bytes() == stored.read_bytes()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1], "expected as many labels as images, 2, got 1"),
        ([1, "cat"], r"the label of sun.png is 'cat'; a label is an int, a dict or None"),
        ([True, 1], "the label of moon.jpg is True"),
        ([1.5, 1], "the label of moon.jpg is 1.5"),
    ],
)
def test_labels_that_cannot_be_stored_are_refused(labels, message, tmp_path, codec, latents):
    with pytest.raises(ValueError, match=message):
        save_latents(tmp_path / "a", latents, codec=codec, names=NAMES, sizes=SIZES, labels=labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batch_and_dtype_are_kept(tmp_path, codec, dtype):
    batch = torch.randn(2, 4, 3, 3).to(dtype)
    save_latents(tmp_path / "a.safetensors", batch, codec=codec, names=NAMES, sizes=[(6, 6), (6, 5)])
    found = load_latents(tmp_path / "a.safetensors")
    assert torch.equal(torch.cat(found.latents), batch)
    assert found.latents[0].dtype == dtype


def test_latents_with_gaps_in_memory_are_stored(tmp_path, codec):
    spread = torch.randn(1, 4, 3, 5).to(memory_format=torch.channels_last)
    save_latents(tmp_path / "a.safetensors", spread, codec=codec, names=["a"], sizes=[(6, 10)])
    assert torch.equal(load_latents(tmp_path / "a.safetensors").latents[0], spread)


@pytest.mark.parametrize("num_levels", [1, 2])
def test_indices_of_each_level_come_back(tmp_path, codec, num_levels):
    grids = [torch.randint(0, 9, (2, 4 * 2**level, 3 * 2**level)) for level in range(num_levels)]
    save_indices(tmp_path / "a.safetensors", grids, codec=codec, names=NAMES, sizes=SIZES)
    found = load_latents(tmp_path / "a.safetensors")
    assert found.latents is None
    for index, levels in enumerate(found.indices):
        assert len(levels) == num_levels
        assert all(torch.equal(found, grid[index : index + 1]) for found, grid in zip(levels, grids))


def test_names_and_sizes_must_match_in_number(tmp_path, codec, latents):
    with pytest.raises(ValueError, match="expected as many names as images, 2, got 1"):
        save_latents(tmp_path / "a", latents, codec=codec, names=["one"], sizes=SIZES)
    assert not list(tmp_path.iterdir())


def test_other_latent_space_is_refused_naming_both(stored, codec):
    other = kl_codec(name="theirs", seed=1)
    with pytest.raises(ValueError) as caught:
        load_latents(stored, codec=other)
    assert str(caught.value) == (
        f"moon.safetensors holds latents of mine (space {codec.space_fingerprint}), "
        f"not of theirs (space {other.space_fingerprint}). Decode it with the codec mine."
    )


def test_other_scale_is_another_latent_space(stored):
    with pytest.raises(ValueError, match="not of mine"):
        load_latents(stored, codec=kl_codec(scaling_factor=0.5))


def test_fine_tuned_decoder_opens_with_a_warning(stored):
    tuned = kl_codec(name="tuned")
    with torch.no_grad():
        tuned.autoencoder.decoder.conv_out.bias.add_(0.1)
    with pytest.warns(
        UserWarning, match="moon.safetensors was encoded by mine .* tuned .* decoder of its own"
    ):
        found = load_latents(stored, codec=tuned)
    assert len(found.latents) == 2


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def _cut_header(path):
    path.write_bytes(path.read_bytes()[:20])


def _empty(path):
    path.write_bytes(b"")


def _giant_header(path):
    path.write_bytes((2**63 - 1).to_bytes(8, "little") + path.read_bytes()[8:])


def _image(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))


def _foreign(path):
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})


def _without_metadata(path):
    save_file({"latents.0": torch.zeros(4, 2, 2)}, path)


def _rewritten(**changes):
    """A latent file whose metadata, or tensors (keys with a dot), are replaced; None deletes."""

    def rewrite(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, value in changes.items():
            key = key.replace("__", ".")
            target = tensors if "." in key else metadata
            if value is None:
                del target[key]
            else:
                target[key] = value
        save_file(tensors, path, metadata)

    return rewrite


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is no latent file, or a truncated one"),
        (_cut_header, "is no latent file, or a truncated one"),
        (_empty, "is no latent file, or a truncated one"),
        (_giant_header, "is no latent file, or a truncated one"),
        (_image, "is no latent file, or a truncated one"),
        (_foreign, "is a safetensors file, but not a latent file"),
        (_without_metadata, "is a safetensors file, but not a latent file"),
        (_rewritten(version="2"), "expected version 1 of the latent file, got 2; update"),
        (_rewritten(names=None), "is damaged: it lacks 'names'"),
        (_rewritten(fingerprint=None), "is damaged: it lacks 'fingerprint'"),
        (_rewritten(names="{"), "is damaged"),
        (_rewritten(names="[" * 100_000), "is damaged"),
        (_rewritten(names="[1, 2]"), "names are no list of strings"),
        (_rewritten(names='["a"]'), "names 1 images and 2 sizes"),
        (_rewritten(sizes="[[8, 8], [8]]"), "is damaged"),
        (_rewritten(sizes="[[8, 8], [8, -8]]"), "sizes are no list of"),
        (_rewritten(sizes="7"), "is damaged"),
        (_rewritten(labels="[1"), "is damaged"),
        (_rewritten(labels="7"), "labels are no list of integers"),
        (_rewritten(labels='[1, "cat"]'), "labels are no list of integers"),
        (_rewritten(labels="[1, true]"), "labels are no list of integers"),
        (_rewritten(labels="[1]"), "it has 2 images and 1 labels"),
        (_rewritten(origins="{}"), "origins are no list with one for each image"),
        (_rewritten(origins="[null]"), "origins are no list with one for each image"),
        (_rewritten(origins='[null, {"kind": "gray"}]'), "expected the origin of a gray image with"),
        (_rewritten(origins='[null, {"kind": "hologram"}]'), "got 'hologram'; update latent-codec"),
        (_rewritten(codec="\x1b[2J"), "codec or fingerprints are malformed"),
        (_rewritten(space_fingerprint="0"), "codec or fingerprints are malformed"),
        (_rewritten(latents__1=None), "it lacks 'latents.1'"),
        (_rewritten(latents__1=torch.zeros(2)), "not floats of shape"),
        (_rewritten(latents__1=torch.zeros(4, 2, 2, dtype=torch.int64)), "not floats of shape"),
        (_rewritten(latents__2=torch.zeros(4, 2, 2)), r"1 tensors belong to no image \(latents.2"),
        (_rewritten(latents__0=None, latents__1=None), "neither latents nor int64 grids"),
    ],
)
def test_damaged_and_foreign_files_give_one_line(stored, damage, message):
    damage(stored)
    with pytest.raises(ValueError, match=message) as caught:
        load_latents(stored)
    assert "\n" not in str(caught.value)
    assert str(stored) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_latents(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="which is a folder; give a file"):
        load_latents(tmp_path)


def test_recognizes_its_own(stored, tmp_path):
    assert is_latent_file(stored)
    _foreign(tmp_path / "other.safetensors")
    _image(tmp_path / "image.png")
    assert not any(map(is_latent_file, [tmp_path / "other.safetensors", tmp_path / "image.png", tmp_path]))


def test_full_disk_leaves_the_old_file_and_nothing_else(stored, codec):
    """A limit on the size of files stands for a full disk: the system refuses the write half way."""
    resource = pytest.importorskip("resource")
    before = stored.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*moon\.safetensors"):
            save_latents(stored, torch.zeros(2, 4, 64, 64), codec=codec, names=NAMES, sizes=[(128, 128)] * 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored.read_bytes() == before
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]


def test_indices_of_images_that_differ_in_size(tmp_path, codec):
    one, other = ([torch.randint(0, 9, (1, n, n)), torch.randint(0, 9, (1, 2 * n, 2 * n))] for n in (2, 3))
    save_indices(tmp_path / "a.safetensors", [one, other], codec=codec, names=NAMES, sizes=SIZES)
    found = load_latents(tmp_path / "a.safetensors").indices
    for stored, given in zip(found, (one, other), strict=True):
        assert all(torch.equal(*levels) for levels in zip(stored, given, strict=True))

    with pytest.raises(ValueError, match="expected images with one number of levels"):
        save_indices(tmp_path / "b.safetensors", [one, other[:1]], codec=codec, names=NAMES, sizes=SIZES)
    with pytest.raises(ValueError, match="expected as many names as images, 2, got 1"):
        save_indices(tmp_path / "b.safetensors", [one, other], codec=codec, names=NAMES[:1], sizes=SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
