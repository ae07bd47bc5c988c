"""Every source holds the same images under the same rules, by index, in order, in any process."""

import gzip
import io
import json
import pickle

import datasets
import numpy as np
import pytest
import torch
from helpers.commands import write_idx, write_tar
from PIL import Image
from torch.utils.data import DataLoader

from latent_codec.images.sources import open_source, open_stream
from latent_codec.images.tensors import ImageError

NUM = 6


def pixels(index: int) -> np.ndarray:
    """Image `index` of every source below: (H, W, 3) uint8, sizes differing."""
    return np.random.default_rng(index).integers(0, 256, (8 + index, 12, 3), np.uint8)


def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(index)).save(file, "PNG")
    return file.getvalue()


def assert_holds_all(source, num: int = NUM):
    assert len(source) == num
    for index in range(num):
        image = source.read(index)
        assert image.dtype == torch.uint8 and image.is_contiguous()
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(index))
        assert source.size(index) == pixels(index).shape[:2]
        assert source.read(index, channels=1).shape == (1, *pixels(index).shape[:2])
        assert source.read(index, channels=4)[3].eq(255).all()
    assert len({source.name(index) for index in range(num)}) == num


@pytest.fixture
def folder(tmp_path):
    for index in range(NUM):
        (tmp_path / f"{index}.png").write_bytes(png(index))
    return tmp_path


@pytest.fixture
def tars(tmp_path):
    """Two tars of three samples each; a .json label in the first, a .cls label in the second."""
    for shard in range(2):
        members = {}
        for index in range(3 * shard, 3 * shard + 3):
            members[f"sub/{index:03d}.png"] = png(index)
            label = {"json": json.dumps({"smiling": index == 1}).encode(), "cls": b"%d\n" % index}
            kind = ("json", "cls")[shard]
            members[f"sub/{index:03d}.{kind}"] = label[kind]
        write_tar(tmp_path / f"photos-{shard:03d}.tar", members)
    return tmp_path


def test_folder(folder):
    (folder / "notes.txt").write_text("not an image")

    for data in (
        folder,
        str(folder),
        [folder],
        sorted(folder.glob("*.png")),
        f"{folder}/{{0..5}}.png",
        f"{folder}/*.png",
    ):
        source = open_source(data)
        assert_holds_all(source)
        assert source.name(2) == str(folder / "2.png") and source.label(2) is None


def test_subfolders_are_classes(tmp_path):
    for index, name in enumerate(["cat/a.png", "cat/deep/b.png", "dog/a.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(index))

    source = open_source(tmp_path)

    assert source.classes == ["cat", "dog"]
    assert [source.label(index) for index in range(3)] == [0, 0, 1]


def test_tars(tars):
    for data in (
        tars,
        f"{tars}/photos-{{000..001}}.tar",
        f"{tars}/photos-*.tar",
        [tars / "photos-000.tar", tars / "photos-001.tar"],
        f"{tars}/photos-00{{0,1}}.tar",
    ):
        source = open_source(data)
        assert_holds_all(source)
        assert source.name(4) == "photos-001.tar/sub/004.png"
        assert source.label(1) == {"smiling": True} and source.label(4) == 4
    assert len(open_source(tars / "photos-001.tar")) == 3


def test_tar_sample_with_several_images(tmp_path):
    tar = write_tar(
        tmp_path / "pairs.tar",
        {
            "a.photo.png": png(0),
            "a.mask.png": png(1),
            "a.txt": b"x",
            ".hidden": b"",
            "dir.d/b.photo.png": png(2),
        },
    )

    assert np.array_equal(open_source(tar).read(0).permute(1, 2, 0), pixels(0))
    masks = open_source(tar, column="mask.png")
    assert len(masks) == 1 and np.array_equal(masks.read(0).permute(1, 2, 0), pixels(1))
    assert [open_source(tar).name(i) for i in range(2)] == [
        "pairs.tar/a.photo.png",
        "pairs.tar/dir.d/b.photo.png",
    ]
    with pytest.raises(ValueError, match=r"no \.depth members in .*pairs\.tar"):
        open_source(tar, column="depth")


def test_damaged_tars(tmp_path, tars):
    whole = tars / "photos-000.tar"
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:2000])
    zipped = tmp_path / "zipped.tar.gz"
    zipped.write_bytes(gzip.compress(whole.read_bytes()))
    (tmp_path / "empty.tar").touch()

    for path in (cut, zipped, tmp_path / "empty.tar"):
        with pytest.raises(
            ValueError, match=rf"{path.name} is no whole, uncompressed tar \(.*\): unpack or copy"
        ) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)


def test_tars_and_images_are_not_mixed(folder):
    write_tar(folder / "a.tar", {"a.png": png(0)})

    with pytest.raises(ValueError, match="holds both tars and images: name the tars"):
        open_source(folder)
    with pytest.raises(ValueError, match=r"cannot be mixed: .*a\.tar, .*0\.png"):
        open_source([folder / "a.tar", folder / "0.png"])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (5, 10, 12), np.uint8)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.array([3, 1, 4, 1, 5], np.uint8))
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images[::-1])

    train, test = open_source(tmp_path), open_source(tmp_path, split="test")

    assert len(train) == len(test) == 5
    assert np.array_equal(train.read(2, channels=1)[0], images[2])
    assert np.array_equal(test.read(2)[1], images[2]) and np.array_equal(
        test.read(0, channels=1)[0], images[4]
    )
    assert [train.label(index) for index in range(5)] == [3, 1, 4, 1, 5] and test.label(0) is None
    assert train.name(2) == "train-00002" and train.size(2) == (10, 12)
    with pytest.raises(ValueError, match="has splits 'train' and 'test', not 'val'"):
        open_source(tmp_path, split="val")


def test_damaged_idx(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, np.zeros((5, 8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short: 320 values announced, 319 there"):
        open_source(tmp_path)

    path.write_bytes(b"\0\0\x0d\3" + bytes(12))
    with pytest.raises(ValueError, match="no IDX file of bytes in 3 dimensions: it starts 00000d03"):
        open_source(tmp_path)

    write_idx(path, np.zeros((5, 8, 8), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match=r"holds 5 images, .* 4 labels"):
        open_source(tmp_path)

    path.unlink()
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(packed, np.zeros((5, 8, 8), np.uint8))
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"ubyte\.gz cannot be read"):
        open_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="no t10k-images-idx3-ubyte"):
        open_source(tmp_path, split="test")


@pytest.fixture
def dataset():
    columns = {
        "caption": [f"number {index}" for index in range(NUM)],
        "image": [{"bytes": png(index), "path": None} for index in range(NUM)],
        "label": [index % 2 for index in range(NUM)],
    }
    features = datasets.Features(
        caption=datasets.Value("string"),
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["even", "odd"]),
    )
    return datasets.Dataset.from_dict(columns, features)


def test_saved_dataset(tmp_path, dataset):
    dataset.with_format("torch").save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    dataset.remove_columns("label").save_to_disk(tmp_path / "captions")

    for source in (open_source(tmp_path / "one"), open_source(tmp_path / "two")):
        assert_holds_all(source)
        assert [source.label(index) for index in range(NUM)] == [0, 1, 0, 1, 0, 1]
    assert open_source(tmp_path / "captions", column="image").label(3) == {"caption": "number 3"}
    assert len(open_source(tmp_path / "two", split="test")) == 1
    with pytest.raises(ValueError, match="has the splits train, test, not validation"):
        open_source(tmp_path / "two", split="validation")
    with pytest.raises(ValueError, match="no column 'caption' of images; its columns: caption, image, label"):
        open_source(tmp_path / "one", column="caption")


def test_dataset_row_without_a_image(tmp_path, dataset):
    rows = dataset.to_dict()
    rows["image"][1] = None
    rows["image"][2] = {"bytes": b"torn", "path": None}
    type(dataset).from_dict(rows, dataset.features).save_to_disk(tmp_path / "torn")

    source = open_source(tmp_path / "torn")

    assert source.read(0).shape == (3, 8, 12)
    for index, reason in ((1, "there is no image in this row"), (2, "not an image in a known format")):
        with pytest.raises(ImageError, match=rf"torn\[{index}\]: {reason}"):
            source.read(index)


@pytest.mark.parametrize("kind", ["folder", "tars", "idx", "dataset"])
def test_sources_pickle_and_work_in_workers(tmp_path, kind, request):
    if kind == "idx":
        write_idx(tmp_path / "train-images-idx3-ubyte", np.stack([pixels(0)[:, :, 0]] * NUM))
    elif kind == "dataset":
        request.getfixturevalue("dataset").save_to_disk(tmp_path / "saved")
    else:
        request.getfixturevalue(kind)
    source = open_source(tmp_path / "saved" if kind == "dataset" else tmp_path)
    expected = [source.read(index) for index in range(NUM)]

    copied = pickle.loads(pickle.dumps(source))
    loader = DataLoader(Reading(source), batch_size=None, num_workers=2)

    for index, image in enumerate(loader):
        assert torch.equal(image, expected[index]) and torch.equal(copied.read(index), expected[index])


class Reading(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source.read(index)


def test_corrupt_image_is_named(folder, tars):
    (folder / "1.png").write_bytes(png(1)[:60])
    with pytest.raises(ImageError, match=r"1\.png: damaged or cut short"):
        open_source(folder / "1.png").read(0)

    tar = write_tar(folder / "torn.tar", {"x/7.jpg": b"torn"})
    with pytest.raises(ImageError, match=r"^torn\.tar/x/7\.jpg: not an image"):
        open_source(tar).read(0)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        open_source(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"photos-001\.tar: no such file"):
        write_tar(tmp_path / "photos-000.tar", {"a.png": png(0)})
        open_source(f"{tmp_path}/photos-{{000..001}}.tar")
    with pytest.raises(ValueError, match="no images in"):
        open_source([tmp_path / "photos-000.tar"][:0])
    write_tar(tmp_path / "photos-000.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match=r"no images in .*photos-000\.tar"):
        open_source(tmp_path)


def test_hub_names():
    with pytest.raises(ValueError, match="one Hugging Face dataset at a time"):
        open_source(["hf:a/b", "hf:c/d"])
    for nameless in ("hf:", "hf:/", "hf::config"):
        with pytest.raises(ValueError, match=rf"expected hf:owner/name, got '{nameless}'"):
            open_source(nameless)
    with pytest.raises(ValueError, match=r"photos cannot be streamed: only hf:owner/name can"):
        open_stream("photos")
    with pytest.raises((OSError, ValueError)):  # offline, and not cached
        open_source("hf:nobody/has-this-data-set")


def test_training_photos(shared):
    source = open_source(f"{shared}/data/photos/photos-{{000..003}}.tar")

    assert len(source) == 996 == len(open_source(shared / "data/photos"))
    assert source.read(0).shape[0] == 3 and max(source.size(995)) <= 832


def test_faces_and_fashion(shared):
    faces = open_source(shared / "data/faces/faces-test.tar")
    fashion = open_source(shared / "data/fashion_mnist", split="test")

    assert len(faces) == 600 and faces.read(0).shape == (3, 109, 89) and "Smiling" in faces.label(0)
    assert len(fashion) == 5000 and fashion.read(0, channels=1).shape == (1, 28, 28)
    assert set(map(fashion.label, range(200))) == set(range(10))
