"""Halfway between two garments: a garment, or two at once?

    pytest tests/benchmarks/test_analysis_morphs.py -s -o addopts=        about 5 minutes of one core

The judge is that of test_priors.py. An image counts as recognized where it takes it for some kind of garment with at least
90 % confidence.
"""

import torch
from judges import CONFIDENCE, probabilities
from tables import table

from latent_codec import LatentCodec
from latent_codec.analysis.morphs import morph
from latent_codec.images.sources import open_source

NUM_PAIRS = 1000
FIRST = 100  # of them, stated as well


def test_halfway_images_are_garments(shared, judge):
    codec = LatentCodec.from_pretrained("garments")
    source = open_source(shared / "data/fashion_mnist", split="test")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[: 2 * NUM_PAIRS]
    pairs = [(source.image(int(a), 1), source.image(int(b), 1)) for a, b in order.view(-1, 2)]
    ends = torch.stack([image for pair in pairs for image in pair])
    halfway = {
        way: torch.stack([morph(codec, pair, steps=3, way=way).frames[1] for pair in pairs])
        for way in ("linear", "spherical")
    }
    seen = {
        "the images themselves": ends,
        "their reconstructions": codec.roundtrip(ends, output_type="pt"),
        "averages of two images' pixels": torch.stack([(a + b) / 2 for a, b in pairs]),
        "averages of two reconstructions' pixels": codec.roundtrip(ends, output_type="pt")
        .unflatten(0, (-1, 2))
        .mean(1),
        **{f"halfway in latents, {way}": images for way, images in halfway.items()},
    }
    recognized = {
        name: (probabilities(judge, each).amax(1) >= CONFIDENCE).float() for name, each in seen.items()
    }
    shares = {name: float(each.mean()) for name, each in recognized.items()}
    rows = [
        (name, f"{each[: FIRST * len(each) // NUM_PAIRS].mean():.0%}", f"{each.mean():.1%}")
        for name, each in recognized.items()
    ]
    table("Random pairs of test garments", ["recognized", f"first {FIRST}", f"all {NUM_PAIRS}"], rows)
    assert shares["halfway in latents, spherical"] > shares["averages of two images' pixels"] + 0.1
