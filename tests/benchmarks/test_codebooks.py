"""What a codebook costs and what it buys: raw blocks, the search, the same network without one, and levels of them.

    pytest tests/benchmarks/test_codebooks.py -s -o addopts=

prints the tables that the README quotes, as Markdown. Networks are trained afresh for every row, through the project's
own trainer and for equally long, so that rows differ by what their names say alone; these trainings are short, and
narrower than the presets that they come from. Needs the data folder next to the checkout; about ten minutes of one idle
core, and as long again for the usage of the shipped codec over all photographs (NUM_PHOTOS=100 takes so many of them).
SEED=1 trains the kinds of codebooks from other initial weights and crops.
"""

import math
import os
import sys
from statistics import mean, median
from time import perf_counter

import pytest
import torch
from processes import run_script
from tables import table
from torch import Tensor
from torch.nn import functional as F

from latent_codec import LatentCodec
from latent_codec.components.codec_folders import ASSETS
from latent_codec.evaluation.reconstruction import reconstruct
from latent_codec.images.sources import ImageSource, open_source, spread
from latent_codec.images.tensors import image_grid, pad_to_multiple
from latent_codec.metrics import lpips_available, lpips_distance, psnr, round_to_8_bits, ssim
from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.models.quantizers import k_means, nearest_codewords, perplexity
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config
from latent_codec.training.loop import train

BLOCK = 8
BLOCKS_PER_PHOTO = 128
SHIPPED = ASSETS / "default-vq-f8"
ROUNDS = 10

PHOTO_STEPS, PHOTO_SIDE = 200, 64
FACE_STEPS, FACE_SIDE, NUM_FACES = 240, 128, 48
SHORT = (
    "optimizer.learning_rate=1e-3",
    "optimizer.ema_decay=0.98",
    "model.arguments.hidden_channels=64",
    "model.arguments.residual_channels=32",
    "run.log_every=100",
)


# Raw blocks


def to_blocks(image: Tensor) -> Tensor:
    """(1, 3, H, W) -> (1, 192, H / 8, W / 8); what does not fill a block is left out."""
    height, width = (side // BLOCK * BLOCK for side in image.shape[2:])
    return F.pixel_unshuffle(image[..., :height, :width], BLOCK)


def blocks_of_photos(source: ImageSource) -> Tensor:
    """(N, 192): as many of every photograph, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for index in range(len(source)):
        blocks = to_blocks(source.image(index, 3)[None])[0].flatten(1).T
        drawn.append(blocks[torch.randperm(len(blocks), generator=generator)[:BLOCKS_PER_PHOTO]])
    return torch.cat(drawn)


def test_codebook_of_raw_blocks(shared, kodak):
    """1,024 codewords that are 8x8x3 blocks themselves, by k-means, and the shipped codec with as many."""
    photos = open_source(shared / "data/photos")
    blocks = blocks_of_photos(photos)
    codebook = k_means(blocks, 1024, num_iterations=25)

    scores, counts = [], torch.zeros(1024)
    for image in kodak:
        grid = to_blocks(image)
        indices = nearest_codewords(grid[0].flatten(1).T, codebook)
        counts += torch.bincount(indices, minlength=1024)
        copy = F.pixel_shuffle(codebook[indices].T.reshape(grid.shape), BLOCK)
        scores.append(psnr(round_to_8_bits(copy.clamp(-1, 1)), image).item())
    used, varied = int((counts > 0).sum()), float(perplexity(counts))
    rows = [[f"k-means of {len(blocks):,} raw blocks", mean(scores), "kodak", used, varied]]

    if (SHIPPED / "config.json").is_file():
        rows.append(row_of_shipped_codec(photos, kodak))
    table(
        "10 bits per 8x8 block (0.156 bits per pixel)",
        ["", "PSNR on kodak, dB", "codewords counted on", "used of 1,024", "perplexity"],
        rows,
    )
    # 0.3 dB: the reference figure comes from another draw of blocks and another start.
    assert mean(scores) == pytest.approx(23.5, abs=0.3)
    assert all(row[1] >= rows[0][1] for row in rows), "under k-means of raw blocks: nothing learned"


def row_of_shipped_codec(photos: ImageSource, kodak: list[Tensor]) -> list:
    codec = LatentCodec.from_pretrained(SHIPPED)
    (size,) = codec.codebook_sizes
    chosen = spread(len(photos), int(os.environ["NUM_PHOTOS"]) if "NUM_PHOTOS" in os.environ else None)
    counts = torch.zeros(size)
    with torch.no_grad():
        score = mean(psnr(reconstruct(codec, image), image).item() for image in kodak)
        for index in chosen:
            (grid,) = codec.encode_indices(photos.image(index, 3)[None])
            counts += torch.bincount(grid.flatten(), minlength=size)
    where = f"{len(chosen)} of {len(photos)} photos, whole"
    return [codec.name, score, where, int((counts > 0).sum()), float(perplexity(counts))]


# The search


def by_cdist(vectors: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(vectors, codebook).argmin(1)


SEARCHES = {"nearest_codewords": nearest_codewords, "torch.cdist": by_cdist}

PEAK = """
import re, sys, torch
from latent_codec.models.quantizers import nearest_codewords
searches = {"nothing": lambda vectors, codebook: None, "nearest_codewords": nearest_codewords,
            "torch.cdist": lambda vectors, codebook: torch.cdist(vectors, codebook).argmin(1)}
ballast = torch.ones(64, 2**20)  # more than importing has taken and given back
vectors, codebook = torch.randn(4096, int(sys.argv[2])), torch.randn(16384, int(sys.argv[2]))
searches[sys.argv[1]](vectors, codebook)
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_megabytes(search: str, dim: int) -> float:
    """What a fresh process holds at most. Not by getrusage, whose peak begins at that of the process before `exec`."""
    return int(run_script(PEAK, search, dim).stdout) / 1024


def seconds_by_turns(vectors: Tensor, codebook: Tensor) -> dict[str, float]:
    times = {name: [] for name in SEARCHES}
    for turn in range(ROUNDS + 1):
        for name, search in SEARCHES.items():
            start = perf_counter()
            search(vectors, codebook)
            if turn:  # the first warms up
                times[name].append(perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc/self/status")
def test_search_against_cdist():
    """A 64x64 grid among 16,384 codewords: the whole table of distances would take 256 MB."""
    rows = []
    for dim in (4, 64, 256):
        generator = torch.Generator().manual_seed(dim)
        vectors = torch.randn(4096, dim, generator=generator)
        codebook = torch.randn(16384, dim, generator=generator)
        ours, theirs = (search(vectors, codebook) for search in SEARCHES.values())
        differ = (ours != theirs).nonzero().flatten()
        exact = [
            (vectors[differ].double() - codebook[indices[differ]].double()).norm(dim=1)
            for indices in (ours, theirs)
        ]
        ours_nearer = int((exact[0] < exact[1]).sum())
        seconds = seconds_by_turns(vectors, codebook)
        idle = peak_megabytes("nothing", dim)
        peaks = {name: peak_megabytes(name, dim) - idle for name in SEARCHES}
        rows.append(
            [
                dim,
                f"{len(ours) - len(differ)} of {len(ours)}",
                f"{ours_nearer} / {len(differ) - ours_nearer}",
                *(f"{peak:.0f}" for peak in peaks.values()),
                seconds["nearest_codewords"] / seconds["torch.cdist"],
            ]
        )
        assert (exact[0] <= exact[1] * (1 + 1e-6)).all(), "a codeword that is not nearest"
        assert peaks["nearest_codewords"] < peaks["torch.cdist"] / 2
    table(
        f"nearest_codewords against torch.cdist(...).argmin(1): 4,096 vectors, 16,384 codewords, float32, "
        f"{torch.get_num_threads()} thread(s), medians of {ROUNDS}",
        [
            "D",
            "same index",
            "else nearer in float64: ours / cdist's",
            "peak, MB",
            "cdist's, MB",
            "time ratio",
        ],
        rows,
    )


# The quantizer's parts


@torch.no_grad()
def usage(model: HierarchicalVQ, images: list[Tensor]) -> list[tuple[int, float]]:
    """Codewords used on `images`, and their perplexity, of each level, top first."""
    grids = zip(*(model.encode_indices(image) for image in images))
    counts = [
        torch.bincount(torch.cat([grid.flatten() for grid in level]), minlength=quantizer.codebook_size)
        for level, quantizer in zip(grids, model.quantizers)
    ]
    return [(int((count > 0).sum()), float(perplexity(count))) for count in counts]


@torch.no_grad()
def copies(model: HierarchicalVQ, images: list[Tensor]) -> list[Tensor]:
    return [round_to_8_bits(model(image).sample.clamp(-1, 1)) for image in images]


def test_parts_of_the_quantizer(shared, kodak, tmp_path):
    """vqvae-2017, narrower and on smaller crops, with parts of its quantizer taken away."""
    photos = open_source(shared / "data/photos")
    begin = PHOTO_STEPS // 5
    parts = {
        "no quantizer": [f"codebook.start_step={PHOTO_STEPS - 1}"],
        "as the preset: late k-means start, restarts": [f"codebook.start_step={begin}"],
        "k-means at the first step, restarts": ["codebook.start_step=0"],
        "late random start, no restarts": [
            f"codebook.start_step={begin}",
            "codebook.kmeans_crops=0",
            "codebook.restart_below=0",
        ],
        "random from the first step, no restarts": [
            "codebook.start_step=0",
            "codebook.kmeans_crops=0",
            "codebook.restart_below=0",
        ],
    }
    rows, score = [], {}
    for name, overrides in parts.items():
        settings = [f"run.steps={PHOTO_STEPS}", f"data.height={PHOTO_SIDE}", *SHORT, *overrides]
        config = load_config("vqvae-2017", settings)
        model = train(config, build_autoencoder(config), photos, tmp_path / str(len(rows))).network
        if name == "no quantizer":
            # A codebook must begin before the end of a run: here for one step, at the lowest rate.
            for quantizer in model.quantizers:
                quantizer.bypassed = True
        score[name] = mean(psnr(copy, image).item() for copy, image in zip(copies(model, kodak), kodak))
        found = [("-", "-")] if name == "no quantizer" else usage(model, kodak)
        rows.append([name, score[name], *found[0]])

    table(
        f"vqvae-2017 with 64 hidden channels after {PHOTO_STEPS} steps of 8 crops of {PHOTO_SIDE} px, on kodak",
        ["", "PSNR, dB", "used of 512", "perplexity"],
        rows,
    )
    assert score["no quantizer"] > max(list(score.values())[1:]), "a code of 9 bits costs something"
    assert (
        score["as the preset: late k-means start, restarts"]
        > score["random from the first step, no restarts"]
    )


# Kinds of codebooks


KIND_STEPS = 600
SEED = int(os.environ.get("SEED", "0"))
KINDS = {
    "VQ: learned, k-means start, restarts": ["codebook.kind=vq"],
    "FSQ: 8 x 8 x 8 values": ["codebook.kind=fsq", "codebook.start_step=0"],
    "LFQ: 9 signs": ["codebook.kind=lfq", "codebook.start_step=0"],
    "LFQ, each sign by those before it": ["codebook.kind=lfq-successive", "codebook.start_step=0"],
    "BSQ: 9 signs of a unit vector": ["codebook.kind=bsq", "codebook.start_step=0"],
}


def test_kinds_of_codebook_at_equal_bits(shared, kodak, runs):
    """vqvae-2017, narrower and on smaller crops: 9 bits for 4x4 pixels, learned codewords against fixed grids of them."""
    photos, rows, score = open_source(shared / "data/photos"), [], {}
    for name, overrides in KINDS.items():
        settings = [f"run.steps={KIND_STEPS}", f"run.seed={SEED}", f"data.height={PHOTO_SIDE}", *SHORT]
        config = load_config("vqvae-2017", [*settings, *overrides])
        out = runs / f"{config.codebook.kind}-{SEED}"
        model = train(config, build_autoencoder(config), photos, out).network
        score[name] = mean(psnr(copy, image).item() for copy, image in zip(copies(model, kodak), kodak))
        rows.append([name, score[name], *usage(model, kodak)[0]])
    table(
        f"512 codewords of several kinds: vqvae-2017 with 64 hidden channels after {KIND_STEPS} steps of 8 crops of "
        f"{PHOTO_SIDE} px, on {len(kodak)} kodak images, seed {SEED}",
        ["", "PSNR, dB", "used of 512", "perplexity"],
        rows,
    )
    learned, fsq, lfq, successive, _ = score.values()
    if SEED == 0:  # seeds of a learned codebook differ by 0.9 dB
        assert fsq > learned - 0.3
        assert lfq > learned - 2.0, "signs are slower to learn, and this is short"
        assert successive > learned - 1.0
    assert successive > lfq
    assert rows[1][2] >= 0.99 * 512 and min(rows[2][2], rows[3][2]) >= 0.9 * 512


SCALE_STEPS = 600


def test_scales_on_faces(shared, runs):
    """VAR's residual scales (arXiv:2404.02905): how much of the shared codebook each uses, and what the first ones show."""
    faces = open_source(shared / "data/faces/faces-train.tar")
    held_out = open_source(shared / "data/faces/faces-test.tar")
    originals = [held_out.image(index, 3)[None] for index in spread(len(held_out), 4 * NUM_FACES)]
    padded = [pad_to_multiple(image, FACE_SIDE) for image in originals]
    height, width = originals[0].shape[2:]
    config = load_config("faces-multi-scale", [f"run.steps={SCALE_STEPS}", "run.log_every=50"])
    model = train(config, build_autoencoder(config), faces, runs / "scales").network
    with torch.no_grad():
        grids = [model.encode_indices(image) for image in padded]
        shown = []
        for scale in range(1, len(model.config.sides) + 1):
            parts = [model.decode_indices(each[:scale])[..., :height, :width].clamp(-1, 1) for each in grids]
            shown.append(mean(psnr(part, image).item() for part, image in zip(parts, originals)))
    used = usage(model, padded)
    table(
        f"Ten scales on {len(originals)} held-out faces, after {SCALE_STEPS} steps of 8 faces",
        ["scale", "indices counted", "used of 512", "perplexity", "PSNR of the scales so far, dB"],
        [
            [f"{side}x{side}", len(padded) * side**2, *each, score]
            for side, each, score in zip(model.config.sides, used, shown)
        ],
    )
    everything = torch.cat([grid.flatten() for each in grids for grid in each]).bincount(minlength=512)
    print(
        f"\nall scales: {int((everything > 0).sum())} of 512 used, perplexity {float(perplexity(everything)):.0f}"
    )
    assert (everything > 0).sum() > 0.9 * 512
    assert shown[-1] > shown[0] + 3, "the finer scales say nothing"


# Levels


LEVELS = {
    "one: 32x32, K = 1,024": ("[4]", 1024),
    "two: 16x16 + 32x32, K = 256": ("[4, 2]", 256),
    "three: 8x8 + 16x16 + 32x32, K = 197": ("[4, 2, 2]", 197),
}


def test_levels_of_equal_bits_on_faces(shared, tmp_path):
    """VQ-VAE-2 (arXiv:1906.00446) in one, two and three levels with the same bits in all: 10,240 a face, or 10,244."""
    faces = open_source(shared / "data/faces/faces-train.tar")
    held_out = open_source(shared / "data/faces/faces-test.tar")
    originals = [held_out.image(index, 3)[None] for index in spread(len(held_out), NUM_FACES)]
    padded = [pad_to_multiple(image, FACE_SIDE) for image in originals]
    height, width = originals[0].shape[2:]

    rows, totals, shown = [], [], [originals[:8]]
    for name, (strides, size) in LEVELS.items():
        config = load_config(
            "vqvae2-three-level",
            [
                f"run.steps={FACE_STEPS}",
                f"data.height={FACE_SIDE}",
                "data.scale=[1.0, 1.0]",
                "data.pad_small=true",
                "optimizer.batch_size=4",
                f"codebook.start_step={FACE_STEPS // 3}",
                "codebook.kmeans_crops=64",
                *SHORT,
                f"model.arguments.strides={strides}",
                f"model.arguments.codebook_sizes={size}",
            ],
        )
        model = train(config, build_autoencoder(config), faces, tmp_path / str(len(rows))).network
        shapes = model.grid_shapes(FACE_SIDE, FACE_SIDE)
        totals.append(sum(map(math.prod, shapes)) * math.log2(size))
        # The padding is no part of the face.
        found = [copy[..., :height, :width] for copy in copies(model, padded)]
        metrics = [psnr, ssim, *([lpips_distance] if lpips_available("squeeze") else [])]
        figures = [mean(metric(*pair).item() for pair in zip(found, originals)) for metric in metrics]
        used = usage(model, padded)
        rows.append(
            [
                name,
                f"{totals[-1]:,.0f}",
                *figures,
                *["-"] * (3 - len(metrics)),
                " + ".join(str(count) for count, _ in used),
                " + ".join(f"{value:.0f}" for _, value in used),
            ]
        )
        shown.append(found[:8])

    with torch.no_grad():
        grids = model.encode_indices(torch.cat(padded[:8]))
        partial = [model.decode_indices(grids[: level + 1]).clamp(-1, 1) for level in range(len(grids))]
    by_level = [list(part[..., :height, :width].split(1)) for part in partial]
    sheet = tmp_path / "levels.png"
    image_grid([image[0] for row in [*shown, *by_level] for image in row], 8).save(sheet)
    table(
        f"Levels on {len(originals)} held-out faces, after {FACE_STEPS} steps of 4 faces, 64 hidden channels (rows of "
        f"{sheet}: originals, one, two, three; three's top alone, top and middle, all)",
        [
            "levels",
            "bits per face",
            "PSNR, dB",
            "SSIM",
            "LPIPS",
            "used codewords, top first",
            "perplexity, top first",
        ],
        rows,
    )
    whole = mean(psnr(part, image).item() for part, image in zip(by_level[-1], originals))
    top = mean(psnr(part, image).item() for part, image in zip(by_level[0], originals))
    print(f"\nthree levels: {whole:.2f} dB from all of them, {top:.2f} dB from the top alone (8 faces)")
    assert whole > top + 1, "the lower levels say nothing"
    assert max(totals) - min(totals) < 1e-3 * min(totals)
