"""`train compatible`: how far latents drift from the reference's, and what reconstruction gains, by `objective.reference_weight`.

    pytest tests/benchmarks/test_compatible.py -s -o addopts=

The reference has room to improve: default-f8c4 of half its width, 100 steps from its linear start. Codec and reference are
measured by the drop-in audit on the 12 Kodak images (their middle 512 px). Five trainings, about 20 minutes of one core; with RUNS=folder
what is there is taken or continued.
"""

import pytest
from tables import table

from latent_codec import LatentCodec
from latent_codec.evaluation.drop_in_audit import audit_drop_in
from latent_codec.images.tensors import center_crop
from latent_codec.training.run import train

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = (1, 0.1, 0.01, 0.001)
SHORT = (
    "run.precision=fp32",
    "run.log_every=20",
    "data.height=64",
    "optimizer.batch_size=8",
    "run.sample_every=1000",
)
REFERENCE = (
    *SHORT,
    "run.calibration_images=64",
    "model.arguments.block_out_channels=[16,32,64,64]",
    "model.arguments.norm_num_groups=4",
    "run.steps=100",
)
COMPATIBLE = (
    *SHORT,
    "run.calibration_images=0",
    "run.steps=300",
    "optimizer.ema_decay=0.98",
    "optimizer.learning_rate=1e-3",
)


def test_drift_and_gain(shared, kodak, runs):
    photos = str(shared / "data/photos")
    train("default-f8c4", photos, runs / "reference", settings=REFERENCE)
    reference = runs / "reference/codec"
    images = [center_crop(image[0], (512, 512)) for image in kodak]
    rows = []
    for weight in WEIGHTS:
        out = runs / f"compatible-{weight}"
        settings = [*COMPATIBLE, f"objective.reference_weight={weight}"]
        train("compatible", photos, out, codec=str(reference), reference=str(reference), settings=settings)
        codecs = LatentCodec.from_pretrained(out), LatentCodec.from_pretrained(reference)
        audit = audit_drop_in(*codecs, images)
        before = audit.psnr_of_reference
        rows.append(
            [weight, audit.drift, audit.fit, audit.psnr - before, audit.psnr_of_reference_by_codec - before]
        )
    columns = [
        "reference_weight",
        "drift, of the spread",
        "fit",
        "gained, dB",
        "gained on the reference's latents, dB",
    ]
    table("Fine-tuned with latents near the reference's", columns, rows)
    drifts, gains = [row[1] for row in rows], [row[3] for row in rows]
    assert drifts == sorted(drifts) and gains == sorted(gains), "what may drift further gains more"
    on_known_latents = [row[4] for row in rows]
    assert on_known_latents[0] == max(on_known_latents) > 0, "and loses the denoisers' latents"
