"""LatentDataset gives what was encoded, from each container, by number and as a stream that goes on where it was."""

import io
import json
import pickle
from itertools import chain

import diffusers
import numpy as np
import pytest
import torch
from helpers.commands import write_tar
from PIL import Image
from torch.utils.data import DataLoader

from latent_codec import LatentCodec, LatentDataset, SettingError
from latent_codec.images.sources import open_source
from latent_codec.latents.data_set import collate
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.plan import EncodingOptions

CONTAINERS = ("webdataset", "parquet", "safetensors")
BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
SIZES = [(16, 16), (16, 24), (16, 16), (24, 16), (16, 16), (16, 24), (16, 16), (16, 16)]


def kl_codec(name="mine", seed=0) -> LatentCodec:
    torch.manual_seed(seed)
    return LatentCodec(diffusers.AutoencoderKL(scaling_factor=0.5, **BLOCKS), name=name)


def photo(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[number], 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight photographs in three sizes, with labels and captions, one without a caption."""
    members = {}
    for number in range(len(SIZES)):
        members |= {f"{number}.png": photo(number), f"{number}.cls": str(number % 3).encode()}
        if number == 1:
            members[f"{number}.note.json"] = b"[1]"
        if number != 3:
            members[f"{number}.txt"] = f"photograph {number}".encode()
    return write_tar(tmp_path_factory.mktemp("photos") / "photos.tar", members)


@pytest.fixture(scope="module")
def codec():
    return kl_codec()


@pytest.fixture(scope="module")
def encoded(codec, photos, tmp_path_factory):
    """Encodes the photographs, once for each set of options, three to a shard."""
    folders = {}

    def encode(container="webdataset", **options):
        key = container, *sorted(options.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("latents")
            options = EncodingOptions(container=container, images_per_shard=3, **options)
            encode_data_set(codec, open_source(photos), folders[key], options, num_workers=0)
        return folders[key]

    return encode


def images(photos, codec):
    source = open_source(photos)
    return [codec.encode(source.image(number))[0] for number in range(len(source))]


@pytest.mark.parametrize("container", CONTAINERS)
def test_samples_are_what_the_codec_gives_with_labels_and_captions(container, encoded, photos, codec):
    dataset = LatentDataset(encoded(container), codec=codec)
    assert len(dataset) == len(SIZES) and not dataset.is_discrete
    assert dataset.latent_space == codec.latent_space
    found = {sample["name"].partition("/")[2][0]: sample for sample in dataset}
    for number, latents in enumerate(images(photos, codec)):
        sample = found[str(number)]
        torch.testing.assert_close(sample["latents"], latents, atol=1e-5, rtol=1e-5)
        assert sample["latents"].dtype == torch.float32
        assert sample["label"] == number % 3
        assert sample["caption"] == ("" if number == 3 else f"photograph {number}")
        assert tuple(sample["size"].tolist()) == SIZES[number]
    with pytest.raises(IndexError):
        dataset[len(SIZES)]
    assert dataset[-1]["name"] == dataset[7]["name"]


@pytest.mark.parametrize(("container", "num_workers"), [("webdataset", 0), ("parquet", 2)])
def test_a_data_loader_just_works(container, num_workers, encoded):
    dataset = LatentDataset(encoded(container, size=16))
    dataset[0]  # so that workers get a data set that has a shard open
    batches = list(DataLoader(dataset, batch_size=3, num_workers=num_workers))
    assert [batch["latents"].shape for batch in batches] == [(3, 4, 8, 8), (3, 4, 8, 8), (2, 4, 8, 8)]
    assert torch.cat([batch["label"] for batch in batches]).dtype == torch.int64
    expected = torch.stack([dataset[number]["latents"] for number in range(8)])
    assert torch.equal(torch.cat([batch["latents"] for batch in batches]), expected)


@pytest.mark.parametrize("container", ("webdataset", "parquet"))
def test_other_members_are_there_where_they_are_asked_for(container, encoded):
    dataset = LatentDataset(encoded(container), extra=True)
    extra = {sample["key"]: sample["extra"] for sample in dataset}
    assert extra.pop("1") == {"note.json": b"[1]"} and not any(extra.values())
    assert "extra" not in LatentDataset(encoded(container))[1]


def test_it_goes_to_processes_that_are_started_anew(encoded):
    dataset = LatentDataset(encoded("webdataset"))
    first = dataset[0]["latents"]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["latents"], first)


@pytest.mark.parametrize("container", ("webdataset", "parquet"))
def test_latents_are_drawn_from_a_stored_posterior(container, encoded, photos, codec):
    folder = encoded(container, size=16, posterior="both")
    dataset, means = LatentDataset(folder), LatentDataset(folder, sample=False)
    source = open_source(photos)
    posterior = codec.posterior(source.image(0))
    torch.testing.assert_close(means[0]["latents"], codec.encode(source.image(0))[0], atol=1e-5, rtol=1e-5)
    draws = torch.stack([dataset[0]["latents"] for _ in range(400)])
    spread = draws.std(0) / (posterior.std[0] * codec.latent_space.scaling_factor)
    torch.testing.assert_close(spread.mean(), torch.tensor(1.0), atol=0.02, rtol=0)  # of 400 x 256 draws
    streams = [[batch["latents"] for batch in dataset.stream(4)] for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*streams, strict=True))
    assert not torch.equal(streams[0][0][0], dataset.stream(4, seed=1).__iter__().__next__()["latents"][0])
    with pytest.raises(SettingError, match="sample: expected False, as no log variance is stored"):
        LatentDataset(encoded(container), sample=True)


def names(stream) -> list[list[str]]:
    return [batch["name"] for batch in stream]


def test_a_stream_has_batches_of_one_size_and_the_same_with_any_number_of_workers(encoded):
    dataset = LatentDataset(encoded())
    stream = dataset.stream(2, shuffle=True, seed=3)
    epochs = [names(stream), names(stream)]
    assert epochs[0] != epochs[1]
    assert all(sorted(chain(*epoch)) == sorted(dataset[n]["name"] for n in range(8)) for epoch in epochs)
    with_workers = dataset.stream(2, shuffle=True, seed=3, num_workers=2)
    assert names(with_workers) == epochs[0]
    assert len(stream) == len(epochs[0])
    loader = DataLoader(dataset.stream(2, shuffle=True, seed=3), batch_size=None, num_workers=2)
    assert names(loader) == epochs[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_goes_on_where_its_state_says(num_workers, encoded):
    dataset = LatentDataset(encoded())
    settings = {"shuffle": True, "seed": 1}
    undisturbed = dataset.stream(2, **settings)
    expected = names(undisturbed) + names(undisturbed)
    stopped = dataset.stream(2, num_workers=num_workers, **settings)
    found = []
    for batch in stopped:
        found.append(batch["name"])
        if len(found) == 3:
            break
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = dataset.stream(2, **settings)
    resumed.load_state_dict(state)
    assert found + names(resumed) + names(resumed) == expected
    with pytest.raises(ValueError, match="expected a stream with the seed 1, got 2"):
        dataset.stream(2, shuffle=True, seed=2).load_state_dict(state)


def test_workers_keep_their_own_state_for_loaders_that_ask_each_of_them(encoded, monkeypatch):
    """As torchdata's StatefulDataLoader does: each worker's stream is asked, and a new worker gets what it said."""
    dataset = LatentDataset(encoded())
    expected = names(dataset.stream(1, shuffle=True))
    worker = type("Worker", (), {"num_workers": 2})()
    monkeypatch.setattr("latent_codec.latents.data_set.get_worker_info", lambda: worker)
    found = {}
    for worker.id in range(2):
        stream = dataset.stream(1, shuffle=True)
        batches = iter(stream)
        first = [next(batches)["name"], next(batches)["name"]]
        again = dataset.stream(1, shuffle=True)
        again.load_state_dict(stream.state_dict())
        found[worker.id] = first + names(again)
    assert [found[number % 2][number // 2] for number in range(8)] == expected


def test_ranks_see_different_samples_and_as_many(encoded, monkeypatch):
    dataset = LatentDataset(encoded(size=16))
    ranks = [names(dataset.stream(2, shuffle=True, rank=rank, world_size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 2
    assert len({name for rank in ranks for batch in rank for name in batch}) == 8
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert names(dataset.stream(2, shuffle=True)) == ranks[1]
    with pytest.raises(SettingError, match="rank: expected 0 to 1, of 2 processes, got 2"):
        dataset.stream(2, rank=2, world_size=2)


def test_flipped_samples_say_so(encoded):
    dataset = LatentDataset(encoded(size=16, flip=True))
    assert len(dataset) == 16
    flipped = collate([dataset[number] for number in range(16)])["flipped"]
    assert flipped.dtype == torch.bool and flipped.sum() == 8


def test_a_tar_with_long_names_is_read_as_any_other(codec, tmp_path):
    """tar has no room for them in a plain header."""
    names = ["a" * 90, "b" * 120, "ü"]
    source = open_source(write_tar(tmp_path / "photos.tar", {f"{name}.png": photo(0) for name in names}))
    options = EncodingOptions(container="webdataset")
    encode_data_set(codec, source, tmp_path / "latents", options, num_workers=0)
    dataset = LatentDataset(tmp_path / "latents")
    assert [sample["key"] for sample in dataset] == names
    assert torch.equal(dataset[0]["latents"], dataset[1]["latents"])


def test_several_data_sets_are_one_and_mixed_spaces_are_refused(encoded, photos, tmp_path):
    one, other = encoded("webdataset"), encoded("parquet")
    dataset = LatentDataset([one, other])
    assert len(dataset) == 16 and torch.equal(dataset[0]["latents"], dataset[8]["latents"])
    encode_data_set(kl_codec("yours", seed=1), open_source(photos), tmp_path / "yours", num_workers=0)
    with pytest.raises(
        ValueError, match=r"holds latents of mine .*, .*yours holds latents of yours .*one latent space"
    ):
        LatentDataset([one, tmp_path / "yours"])


def test_the_codec_is_checked_whatever_it_is_given_as(encoded, codec, tmp_path):
    folder = encoded()
    codec.save_pretrained(tmp_path / "mine")
    pipe = diffusers.DiTPipeline(None, codec.autoencoder, diffusers.DDIMScheduler())
    half = diffusers.AutoencoderKL.from_pretrained(tmp_path / "mine", torch_dtype=torch.float16)
    for given in (codec, codec.autoencoder, tmp_path / "mine", str(tmp_path / "mine"), pipe, half):
        assert LatentDataset(folder).check(given) is None
    half.register_to_config(_name_or_path="")
    with pytest.raises(ValueError, match=r"the autoencoder is in float16, .* give its folder"):
        LatentDataset(folder, codec=half)
    with pytest.raises(ValueError, match="expected a codec, an autoencoder, a pipeline or a path, got int"):
        LatentDataset(folder, codec=3)
    other = kl_codec("yours", seed=1)
    other.save_pretrained(tmp_path / "yours")
    for given in (other, other.autoencoder, tmp_path / "yours"):
        with pytest.raises(
            ValueError, match=r"holds latents of mine \(space \w{16}\), not of \S+ \(space \w{16}\)"
        ):
            LatentDataset(folder, codec=given)
    tuned = kl_codec()
    with torch.no_grad():
        tuned.autoencoder.decoder.conv_in.bias += 1
    tuned.weights_changed()
    assert "shares its latent space" in LatentDataset(folder).check(tuned)


def test_missing_and_damaged_shards_are_one_line(encoded, tmp_path):
    import shutil

    folder = tmp_path / "latents"
    shutil.copytree(encoded(), folder)
    first, second, _ = sorted((folder / "shards").glob("*.tar"))
    content = bytearray(first.read_bytes())
    content[1000] ^= 255
    first.write_bytes(content)
    assert [what for _, what in LatentDataset(folder).verify()] == [
        "is damaged: its checksum differs",
        None,
        None,
    ]
    second.unlink()
    with pytest.raises(
        ValueError, match=r"shards/00001-\w{8}.tar is missing; `latent-codec encode`"
    ) as caught:
        LatentDataset(folder)
    assert "\n" not in str(caught.value)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match=r"is not complete: 3 of its shards are there"):
        LatentDataset(folder)
    with pytest.raises(ValueError, match=r"is no data set of latents: it has no index\.json"):
        LatentDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one data set"):
        LatentDataset([])


def test_a_url_works_as_a_folder_does(encoded, codec, photos):
    options = EncodingOptions(container="webdataset", images_per_shard=3)
    encode_data_set(codec, open_source(photos), "memory://latents", options, num_workers=0)
    dataset, local = LatentDataset("memory://latents"), LatentDataset(encoded())
    assert all(torch.equal(dataset[number]["latents"], local[number]["latents"]) for number in range(8))


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_learns_from_latent_files_opens_every_container(container, encoded, codec):
    from latent_codec.latents.encoded_images import are_latent_files, open_encoded

    dataset, opened = LatentDataset(encoded(container)), open_encoded(encoded(container), codec=codec)
    assert are_latent_files([encoded(container)]) and len(opened) == len(dataset)
    for number, sample in enumerate(dataset):
        assert torch.equal(opened.latents(number), sample["latents"])
        assert (opened.name(number), opened.label(number)) == (sample["name"], sample["label"])
        height, width = opened.size(number)
        assert sample["latents"].shape == (4, height // 2, width // 2)
