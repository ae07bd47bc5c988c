"""What the shipped Fashion-MNIST pipeline draws, as a judge sees it that never saw its classifier's images.

    pytest tests/benchmarks/test_priors.py -s -o addopts=           about 8 minutes of one core

The judge (conftest.py) is trained on the half of the images that the shipped classifier was not trained on.
"""

import torch
from judges import probabilities
from tables import table

from latent_codec import LatentCodec
from latent_codec.components.codec_folders import ASSETS
from latent_codec.images.sources import open_source
from latent_codec.pipelines import PriorPipeline


def test_a_judge_sees_what_was_asked_for(shared, judge):
    pipe = PriorPipeline.from_pretrained(ASSETS / "fashion-mnist", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    source = open_source(shared / "data/fashion_mnist", split="test")
    images = torch.stack([source.read(index, 1) for index in range(len(source))]) / 127.5 - 1
    labels = torch.tensor([source.label(index) for index in range(len(source))])
    codec = LatentCodec(pipe.vae)
    decoded = [
        codec.decode_indices(codec.encode_indices(part), output_type="pt") for part in images.split(500)
    ]
    real, restored = (
        float((probabilities(judge, each).argmax(1) == labels).float().mean())
        for each in (images, torch.cat(decoded))
    )
    rows = [("real test images", f"{real:.1%}"), ("their reconstructions", f"{restored:.1%}")]
    agreement = {}
    for keep, num_images in ((None, 100), (0.25, 400)):
        out = pipe(
            list(range(10)),
            num_images,
            keep=keep,
            batch_size=500,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        agrees = probabilities(judge, out.images).argmax(1) == torch.tensor(out.class_labels)
        assert len(agrees) == 1000
        agreement[keep] = float(agrees.float().mean())
        rows.append((f"1,000 samples, keep {keep}", f"{agreement[keep]:.1%}"))
    table("The judge agrees with the label", ["of", "share"], rows)
    assert agreement[None] >= 0.8 and agreement[0.25] >= 0.93
