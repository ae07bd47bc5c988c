"""Data order is a pure function of seed and position; streams resume to the very crop; corrupt files are skipped."""

import io
import itertools
import multiprocessing
import pickle
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from latent_codec.images.sources import open_source
from latent_codec.training.data import PositionSampler, StreamedCrops, TrainingCrops, random_resized_crop

# Loaders' processes get their data pickled, as where processes are spawned.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["latent_codec.images.sources", "latent_codec.training.data"])
STEP = 12  # levels of red from one image to the next


def gradient(index: int, height: int = 40, width: int = 56) -> np.ndarray:
    """(H, W, 3) uint8: every pixel tells its image, row and column."""
    y, x = np.mgrid[:height, :width]
    return np.stack([np.full_like(y, STEP * index), 4 * y, 4 * x], -1).astype(np.uint8)


def png(index: int, **size) -> bytes:
    file = io.BytesIO()
    Image.fromarray(gradient(index, **size)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for index in range(7):
        (tmp_path / f"{index}.png").write_bytes(png(index))
    return tmp_path


def crops_of(folder, **options) -> TrainingCrops:
    return TrainingCrops(open_source(folder), **{"size": (16, 24), "seed": 3, **options})


def which_images(crops: TrainingCrops, positions) -> list[int]:
    """Read from the pixels, not from the code: the red channel is STEP times the index."""
    return [round((crops[position][0].mean().item() + 1) * 127.5 / STEP) for position in positions]


# Purity


def test_a_position_gives_the_same_bits_always_and_everywhere(folder):
    options = {"scale": (0.5, 1.5)}
    crops = crops_of(folder, **options)
    positions = list(range(20))
    expected = [crops[position].clone() for position in positions]

    assert expected[0].shape == (3, 16, 24) and expected[0].dtype == torch.float32
    for again in (
        crops,  # now from the cache
        crops_of(folder, **options, cache_bytes=0),
        pickle.loads(pickle.dumps(crops)),
    ):
        for position in reversed(positions):  # in another order
            assert torch.equal(again[position], expected[position])
    for start_method in ("fork", FORKS):
        loader = DataLoader(
            crops_of(folder, **options),
            batch_sampler=PositionSampler(0, batch_size=4, num_steps=5),
            num_workers=2,
            multiprocessing_context=start_method,
        )
        assert torch.equal(torch.cat(list(loader)), torch.stack(expected))


def test_other_seeds_and_positions_give_other_crops(folder):
    crops, other = crops_of(folder), crops_of(folder, seed=4)

    assert not any(torch.equal(crops[position], other[position]) for position in range(10))
    assert not any(torch.equal(crops[position], crops[position + 7]) for position in range(10))


def test_each_epoch_is_a_permutation_of_its_own(folder):
    crops = crops_of(folder)

    assert len(crops) == 7
    epochs = [which_images(crops, range(7 * epoch, 7 * epoch + 7)) for epoch in range(6)]

    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_training_crops_do_not_touch_global_randomness(folder):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()

    crops_of(folder)[11]

    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


# Windows


def test_native_scale_keeps_pixels_and_covers_every_window(folder):
    crops = crops_of(folder, flip=False)
    corners = set()
    for position in range(600):
        crop = crops[position].add(1).mul(127.5)
        top, left = round(crop[1, 0, 0].item() / 4), round(crop[2, 0, 0].item() / 4)
        expected = gradient(0)[top : top + 16, left : left + 24]
        np.testing.assert_allclose(crop[1:].permute(1, 2, 0), expected[:, :, 1:], atol=1e-3)
        corners.add((top, left))
    assert {top for top, _ in corners} == set(range(25)) and {left for _, left in corners} == set(range(33))


def test_flip_mirrors_half_of_the_crops(folder):
    flipped = sum(
        bool(crop[2, 0, 0] > crop[2, 0, -1]) for crop in map(crops_of(folder).__getitem__, range(400))
    )

    assert 150 < flipped < 250  # 200 +- 5 standard deviations
    crops = crops_of(folder, flip=False)
    assert not any(crops[position][2, 0, 0] > crops[position][2, 0, -1] for position in range(50))


def test_scale_is_log_uniform_and_resizes_the_window():
    # Columns rise by one level per pixel, so the slope inside the crop is 1 / factor.
    ramp = torch.arange(256, dtype=torch.uint8).expand(1, 256, 256).contiguous()
    factors = []
    for position in range(400):
        rng = np.random.default_rng(position)
        crop = random_resized_crop(ramp, (32, 32), (0.25, 1.0), False, rng)
        factors.append(26 * 2 / 255 / (crop[0, 16, 29] - crop[0, 16, 3]).item())

    logs = np.log2(factors)
    assert -2.05 < logs.min() < -1.9 and -0.1 < logs.max() < 0.05
    assert abs(logs.mean() + 1) < 0.13  # 4.5 standard errors of a uniform draw from [-2, 0]


def test_shrinking_averages_instead_of_picking_pixels():
    checks = (torch.arange(128) + torch.arange(128)[:, None]).remainder(2).mul(255).to(torch.uint8)[None]

    crop = random_resized_crop(checks, (32, 32), (0.25, 0.25), False, np.random.default_rng(0))

    assert (
        crop[:, 4:-4, 4:-4].abs().max() < 0.05
    )  # mid-gray; without antialiasing it would be black and white


def test_small_images_are_padded_where_asked_and_large_ones_left_alone(folder):
    crops = crops_of(folder, size=(48, 64), pad_small=True, flip=False)
    for position in range(7):
        pixels = torch.from_numpy(gradient(crops.image_index(position))).permute(2, 0, 1).float() / 127.5 - 1
        crop = crops[position]
        assert torch.equal(crop[:, :40, :56], pixels)
        assert torch.equal(crop[:, 40:, :56], pixels[:, -1:].expand(-1, 8, -1))
        assert torch.equal(crop[:, :, 56:], crop[:, :, 55:56].expand(-1, -1, 8))
    padded, plain = (crops_of(folder, pad_small=pad) for pad in (True, False))
    assert all(torch.equal(padded[position], plain[position]) for position in range(7))


@pytest.mark.parametrize("height, width", [(10, 60), (60, 10), (9, 9)])
def test_small_images_are_enlarged_just_enough(height, width):
    pixels = torch.from_numpy(gradient(1, height, width)).permute(2, 0, 1)

    crop = random_resized_crop(pixels, (32, 32), (0.5, 1.0), False, np.random.default_rng(0))

    assert crop.shape == (3, 32, 32) and crop.abs().max() <= 1
    # The short side is used whole: its ramp is seen from end to end.
    short = crop[1, :, 16] if height <= width else crop[2, 16]
    levels = (short + 1) * 127.5
    assert levels[0] < 4 and levels[-1] > 4 * (min(height, width) - 1) - 4


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_oblong_crops(folder, channels):
    crop = crops_of(folder, channels=channels, size=(8, 32))[0]

    assert crop.shape == (channels, 8, 32) and crop.min() >= -1 and crop.max() <= 1
    assert channels != 4 or crop[3].eq(1).all()


def test_by_area_draws_large_images_more_often(tmp_path):
    for index in range(10):
        size = {"height": 60, "width": 60} if index < 5 else {"height": 20, "width": 20}
        (tmp_path / f"{index}.png").write_bytes(png(index, **size))
    (tmp_path / "corrupt.png").write_bytes(b"")
    crops = crops_of(tmp_path, size=(8, 8), by_area=True)

    drawn = which_images(crops, range(440))

    assert sum(index < 5 for index in drawn) / 440 == pytest.approx(0.9, abs=0.03)  # 3600 of 4000 pixels
    assert set(drawn) == set(range(10)) and not crops.skipped
    assert which_images(crops_of(tmp_path, size=(8, 8), by_area=True), [400, 17]) == [drawn[400], drawn[17]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": (0, 8)}, r"size: expected \(height, width\) in pixels, each at least 1, got \(0, 8\)"),
        ({"channels": 2}, "channels: expected 1, 3 or 4, got 2"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"scale": (1.0, 0.5)}, r"scale: expected .*, got \(1.0, 0.5\)"),
        ({"scale": (0.0, 1.0)}, r"scale: expected .*, got \(0.0, 1.0\)"),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        crops_of(folder, **options)


# Corrupt images


def test_corrupt_images_are_replaced_counted_and_reported_once(folder, caplog):
    (folder / "2.png").write_bytes(png(2)[:50])
    (folder / "3.png").write_bytes(b"torn")
    crops = crops_of(folder)

    drawn = which_images(crops, range(70))

    assert drawn.count(4) == 30 and drawn.count(2) == drawn.count(3) == 0  # 4 replaces 2 and 3
    assert crops.skipped == [str(folder / "2.png"), str(folder / "3.png")]
    lines = caplog.messages
    assert len(lines) == 2 and all(line.startswith("skipped: ") for line in lines)
    assert which_images(crops_of(folder), reversed(range(70))) == drawn[::-1]


@pytest.mark.parametrize("start_method", ["fork", FORKS])
def test_the_parent_learns_what_its_workers_skipped(folder, start_method):
    (folder / "2.png").write_bytes(b"torn")
    crops = crops_of(folder)

    list(
        DataLoader(
            crops,
            batch_sampler=PositionSampler(0, batch_size=7, num_steps=1),
            num_workers=1,
            multiprocessing_context=start_method,
        )
    )

    assert crops.skipped == [str(folder / "2.png")]


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"torn")

    with pytest.raises(ValueError, match=r"none of the 1 images can be read, the first is .*a\.png"):
        crops_of(tmp_path)[0]
    with pytest.raises(ValueError, match="none of the 1 images can be opened"):
        crops_of(tmp_path, by_area=True)


def test_cache_keeps_within_its_bytes(folder):
    one = 40 * 56 * 3
    crops = crops_of(folder, cache_bytes=3 * one)
    expected = crops_of(folder, cache_bytes=0)
    for position in range(14):
        assert torch.equal(crops[position], expected[position])
    for path in folder.glob("*.png"):
        path.unlink()

    assert len(set(which_images(crops, range(7)))) == 3  # the three that were kept stand in for the rest


# Sharing positions out


def test_positions_follow_the_formula():
    batch_size, accumulation, num_processes = 3, 2, 4
    for process in range(num_processes):
        batches = list(
            PositionSampler(
                5,
                batch_size=batch_size,
                accumulation=accumulation,
                process_index=process,
                num_processes=num_processes,
                num_steps=2,
            )
        )
        expected = [
            [((s * accumulation + k) * num_processes + process) * batch_size + i for i in range(batch_size)]
            for s in (5, 6)
            for k in range(accumulation)
        ]
        assert batches == expected


@pytest.mark.parametrize("start_step", [0, 1, 17])
def test_two_processes_see_what_one_with_the_doubled_batch_sees(start_step):
    common = {"accumulation": 3, "num_steps": 4}
    one = list(PositionSampler(start_step, batch_size=8, **common))
    two = [
        list(PositionSampler(start_step, batch_size=4, process_index=process, num_processes=2, **common))
        for process in range(2)
    ]

    assert [first + second for first, second in zip(*two)] == one


def test_starting_late_is_starting_early_and_skipping():
    common = {"batch_size": 4, "accumulation": 2, "process_index": 1, "num_processes": 2}

    endless = iter(PositionSampler(0, **common))
    early = list(itertools.islice(endless, 20))

    assert list(itertools.islice(PositionSampler(7, **common), 6)) == early[14:]


def test_sampler_refuses_nonsense():
    with pytest.raises(ValueError, match="process_index: expected from 0 to 1, got 2"):
        PositionSampler(batch_size=1, process_index=2, num_processes=2)
    with pytest.raises(ValueError, match="at least 1"):
        PositionSampler(batch_size=0)


# Streams


def examples(shards):
    for shard in shards:
        for place in range(5):
            yield {"image": {"bytes": png(shard * 5 + place, height=8, width=8), "path": None}, "other": 1}


def generated_stream(num_shards: int = 2):
    features = datasets.Features(image=datasets.Image(), other=datasets.Value("int64"))
    return datasets.IterableDataset.from_generator(
        examples, features=features, gen_kwargs={"shards": list(range(num_shards))}
    )


@pytest.fixture
def tar_stream(tmp_path):
    """Two webdataset tars of five and four images, read in order by `datasets`, as from the hub."""
    for shard, numbers in enumerate((range(5), range(5, 9))):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in numbers:
                entry = tarfile.TarInfo(f"{number:03d}.png")
                content = png(number, height=8, width=8)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    files = sorted(map(str, tmp_path.glob("*.tar")))
    cache = str(tmp_path / "cache")
    return lambda: datasets.load_dataset(
        "webdataset", data_files=files, split="train", streaming=True, cache_dir=cache
    )


def streamed(stream, **options) -> StreamedCrops:
    return StreamedCrops(stream, **{"size": (8, 8), "seed": 1, "scale": (0.5, 2.0), **options})


def numbers(crops) -> list[int]:
    return [round((crop[0].mean().item() + 1) * 127.5 / STEP) for crop in crops]


def test_stream_gives_every_image_in_every_epoch(tar_stream):
    for stream, total in ((tar_stream(), 9), (generated_stream(), 10)):
        drawn = numbers(itertools.islice(streamed(stream), 6 * total))

        epochs = [drawn[start : start + total] for start in range(0, len(drawn), total)]
        assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
        assert len({epoch[0] for epoch in epochs}) == 2  # the shards change places, not the images in them


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 9, 10, 11, 23])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_stream_resumes_to_the_very_crop(taken, num_processes):
    options = {"num_processes": num_processes, "process_index": num_processes - 1}
    whole = list(itertools.islice(streamed(generated_stream(), **options), taken + 12))

    first = streamed(generated_stream(), **options)
    for crop, expected in zip(itertools.islice(first, taken), whole):
        assert torch.equal(crop, expected)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = streamed(generated_stream(), **options)
    second.load_state_dict(state)

    for crop, expected in zip(itertools.islice(second, 12), whole[taken:], strict=True):
        assert torch.equal(crop, expected)


def test_tar_stream_resumes_through_a_data_loader(tar_stream):
    whole = list(itertools.islice(DataLoader(streamed(tar_stream()), batch_size=4), 6))
    first = streamed(tar_stream())
    list(itertools.islice(DataLoader(first, batch_size=4), 2))

    second = streamed(tar_stream())
    second.load_state_dict(first.state_dict())

    for batch, expected in zip(itertools.islice(DataLoader(second, batch_size=4), 4), whole[2:], strict=True):
        assert torch.equal(batch, expected)


@pytest.mark.parametrize("num_shards, num_processes", [(4, 2), (2, 2), (3, 2), (1, 2)])
def test_processes_share_a_stream_without_overlap(num_shards, num_processes):
    total = 5 * num_shards
    parts = [
        streamed(generated_stream(num_shards), process_index=process, num_processes=num_processes)
        for process in range(num_processes)
    ]
    counts = [total // num_processes] * num_processes
    if num_shards % num_processes:  # one example in two of every shard of five: three or two
        counts = [3 * num_shards, 2 * num_shards]

    drawn = [numbers(itertools.islice(part, count)) for part, count in zip(parts, counts)]

    assert sorted(itertools.chain(*drawn)) == list(range(total))


def test_stream_skips_corrupt_images(caplog):
    def torn(shards):
        for number, example in enumerate(examples(shards)):
            if number % 5 == 2:
                example["image"] = {"bytes": b"torn", "path": f"{number}.png"}
            if number % 5 == 3:
                example["image"] = None
            yield example

    features = datasets.Features(image=datasets.Image(), other=datasets.Value("int64"))
    stream = datasets.IterableDataset.from_generator(torn, features=features, gen_kwargs={"shards": [0]})
    crops = streamed(stream)

    assert numbers(itertools.islice(crops, 6)) == [0, 1, 4, 0, 1, 4]
    assert crops.skipped == ["2.png", "shard 0, image 3"]
    lines = caplog.messages
    assert len(lines) == 2 and lines[0].startswith("skipped: 2.png: not an image")


def test_stream_refuses_what_it_cannot_do():
    def nothing(shards):
        yield from ()

    features = datasets.Features(image=datasets.Image())
    empty = datasets.IterableDataset.from_generator(nothing, features=features, gen_kwargs={"shards": [0]})
    with pytest.raises(ValueError, match="the stream gives process 0 of 1 no images"):
        next(iter(streamed(empty)))
    with pytest.raises(ValueError, match="no column 'photo' of images; its columns: image, other"):
        streamed(generated_stream(), column="photo")
    state = streamed(generated_stream(), num_processes=2).state_dict()
    with pytest.raises(ValueError, match="saved with num_processes=2 and cannot go on with 1"):
        streamed(generated_stream()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"use DataLoader\(num_workers=0\)"):
        next(iter(DataLoader(streamed(generated_stream()), batch_size=1, num_workers=1)))
