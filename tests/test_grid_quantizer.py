"""Fixed grids of codewords: against the nearest codeword, against diffusers' VQModel, their loss terms by definition, and
two steps of training."""

import itertools
import math

import pytest
import torch
from diffusers import VQModel
from helpers.training import run_tiny, tiny_config, write_images

from latent_codec import AutoencoderVQ, LatentCodec
from latent_codec.cli import main
from latent_codec.errors import SettingError
from latent_codec.models.grid_quantizer import GridQuantizer, SuccessiveSigns, values_for
from latent_codec.models.initialization import initialize_codebooks
from latent_codec.models.quantizers import VectorQuantizer
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import dump_toml
from latent_codec.training.report import read_metrics

GRIDS = {"fsq": ("fsq", (8, 5, 5, 3)), "lfq": ("lfq", (2,) * 6), "bsq": ("bsq", (2,) * 6)}
CONFIG = {
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "latent_channels": 4,
    "num_vq_embeddings": 512,
    "mid_block_add_attention": False,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_indices_are_those_of_the_nearest_codewords(name, dtype):
    quantizer = GridQuantizer(*GRIDS[name])
    latents = (randn(2, quantizer.dim, 16, 16) * quantizer.limit).to(dtype)
    output = quantizer(latents)
    # float64, where a sum of squares has no ties that rounding could make
    assert torch.equal(output.indices, VectorQuantizer.assign(quantizer, latents.double()))
    assert torch.equal(output.indices, quantizer.assign(latents)) and output.quantized.dtype == dtype
    assert output.indices.unique().numel() > 50
    codewords = quantizer.lookup(output.indices).to(dtype)
    torch.testing.assert_close(
        output.quantized, codewords, atol=0, rtol=1e-2 if dtype != torch.float32 else 1e-6
    )
    everything = torch.arange(quantizer.codebook_size).view(1, 1, -1)
    assert torch.equal(quantizer.assign(quantizer.lookup(everything)), everything)


def test_the_grids_are_those_of_the_papers():
    fsq, bsq = GridQuantizer("fsq", (3, 2)), GridQuantizer("bsq", (2,) * 5)
    assert fsq.embedding.weight.tolist() == [[-1, -1], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 1]]
    torch.testing.assert_close(bsq.embedding.weight.norm(dim=1), torch.ones(32))
    assert GridQuantizer("lfq", (2,) * 3).embedding.weight.abs().unique().tolist() == [1]
    assert values_for("fsq", 1024) == (8, 5, 5, 5) and values_for("bsq", 1024) == (2,) * 10


def test_gradients_of_fsq_pass_inside_the_range_and_its_loss_brings_back_what_lies_beyond():
    quantizer = GridQuantizer("fsq", (8, 8))
    quantizer.entropy_weight = 0.0
    latents = torch.tensor([0.3, 2.0]).view(1, 2, 1, 1).requires_grad_()
    output = quantizer(latents)
    (gradient,) = torch.autograd.grad(output.quantized.sum(), latents, retain_graph=True)
    assert gradient.flatten().tolist() == [1, 0]
    (gradient,) = torch.autograd.grad(quantizer.loss(output), latents)
    assert gradient.flatten().tolist() == [0, 0.25 * 2 * 1 / 2]


@pytest.mark.parametrize("name", GRIDS)
def test_the_entropy_term_is_that_of_all_codewords_one_by_one(name):
    """q(c | z) by the distances to every codeword, without the factors."""
    quantizer = GridQuantizer(*GRIDS[name])
    z = randn(1, quantizer.dim, 4, 5, seed=1).double() * 0.7 * quantizer.limit
    halves = torch.tensor([quantizer.limit / (number - 1) for number in quantizer.values_per_channel])
    units = (z.movedim(1, -1).flatten(0, 2)[:, None] - quantizer.embedding.weight) / halves
    q = (-units.square().sum(2)).softmax(1)
    entropy = [-torch.xlogy(each, each).sum(-1) for each in (q, q.mean(0))]
    torch.testing.assert_close(quantizer.entropy_loss(z), entropy[0].mean() - entropy[1])


def test_the_entropy_term_is_least_for_sure_latents_that_use_all_codewords_alike():
    quantizer = GridQuantizer("lfq", (2,) * 4)
    everything = torch.tensor(list(itertools.product((-9.0, 9.0), repeat=4))).T.view(1, 4, 4, 4)
    assert float(quantizer.entropy_loss(everything)) == pytest.approx(-math.log(16), abs=1e-5)
    assert float(quantizer.entropy_loss(everything[:, :, :1, :1])) == pytest.approx(0, abs=1e-5)
    far = (everything * 100).requires_grad_()  # where most shares are 0
    (gradient,) = torch.autograd.grad(quantizer.entropy_loss(far), far)
    assert gradient.isfinite().all()


def test_each_sign_sees_those_before_it_one_position_at_a_time():
    """z_k = a_k + sum_{j<k} U_kj sign(z_j), written down for each position; what is not below the diagonal says nothing."""
    quantizer = SuccessiveSigns((2,) * 5)
    quantizer.feedback.data.copy_(randn(5, 5, seed=3) / quantizer.RATE)
    latents = randn(2, 5, 3, 4)
    output = quantizer(latents)
    u = (quantizer.feedback * quantizer.RATE).tolist()
    for batch, row, column in itertools.product(range(2), range(3), range(4)):
        signs, index = [], 0
        for channel, value in enumerate(latents[batch, :, row, column].tolist()):
            z = value + sum(gain * sign for gain, sign in zip(u[channel], signs))
            signs.append(1 if z > 0 else -1)
            index = 2 * index + (z > 0)
            seen = output.latents[batch, channel, row, column].item()
            assert seen == pytest.approx(min(max(z, -1), 1), abs=1e-5)
        assert output.quantized[batch, :, row, column].tolist() == pytest.approx(signs, abs=1e-6)
        assert int(output.indices[batch, row, column]) == index
    assert torch.equal(quantizer.assign(latents), output.indices)
    assert not torch.equal(GridQuantizer("lfq", (2,) * 5).assign(latents), output.indices)


def test_successive_signs_begin_as_the_digits_of_what_varies_most():
    """One direction that matters gets all the bits: eight signs find 256 even steps, eight planes nine at most."""
    quantizer = SuccessiveSigns((2,) * 8)
    along = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    vectors = along[:, None] * torch.nn.functional.normalize(randn(1, 8), dim=1)
    latents = (vectors @ quantizer.start_from(vectors).T).float().T.reshape(1, 8, 1, -1)
    indices = quantizer.assign(latents).flatten()
    assert indices.unique().numel() > 250
    ordered = indices if indices[-1] > indices[0] else indices.flip(0)
    assert (ordered.diff() >= 0).all()
    plain = GridQuantizer("lfq", (2,) * 8)
    axes = plain.start_from(vectors)
    assert plain.assign((vectors @ axes.T).float().T.reshape(1, 8, 1, -1)).unique().numel() <= 9


def test_every_sign_and_the_feedback_learn():
    """The straight-through estimator passes through the signs: an earlier channel also learns by what later ones see of it."""
    quantizer = SuccessiveSigns((2,) * 3)
    quantizer.entropy_weight = 0.0
    quantizer.feedback.data.copy_(torch.tensor([[9.0, 9, 9], [-0.5, 9, 9], [-1, -0.5, 9]]) / quantizer.RATE)
    latents = torch.tensor([0.3, 0.6, 1.2]).view(1, 3, 1, 1).requires_grad_()
    weights = torch.tensor([4.0, 2, 1]).view(1, 3, 1, 1)
    (quantizer(latents).quantized * weights).sum().backward()
    assert latents.grad.flatten().tolist() == pytest.approx([4 - 0.5 * (2 - 0.5) - 1, 2 - 0.5, 1])
    assert quantizer.feedback.grad[1, 0] != 0 and quantizer.feedback.grad.triu().abs().sum() == 0


@pytest.fixture(scope="module")
def make_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


@pytest.mark.parametrize("kind", ["fsq", "lfq", "bsq"])
def test_a_preset_trains_with_another_kind_and_plain_vqmodel_reads_its_folder(kind, tmp_path, make_images):
    config = tiny_config(
        model={"class_name": "AutoencoderVQ", "arguments": CONFIG},
        codebook={"kind": kind, "start_step": 1},
        run={"steps": 3, "log_every": 1, "calibration_images": 0},
    )
    preset, run = tmp_path / "tiny.toml", tmp_path / "run"
    preset.write_text(dump_toml(config.to_dict()))
    assert main(["train", str(preset), "--data", str(make_images), "--out", str(run)]) == 0
    metrics = read_metrics(run)
    assert metrics[-1]["used_codes"] > 1 and metrics[-1]["entropy"] < 0

    model, plain = AutoencoderVQ.from_pretrained(run / "codec"), VQModel.from_pretrained(run / "codec")
    assert model.config.quantizer == kind and model.quantize.kind == kind
    assert torch.equal(model.quantize.embedding.weight, build_autoencoder(config).quantize.embedding.weight)
    image = randn(2, 3, 16, 24).clamp(-1, 1)
    latents = plain.encode(image).latents
    indices = plain.quantize(latents)[2][2].view(2, 8, 12)
    assert torch.equal(indices, model.encode_indices(image))
    # to the same bits, but for latents that are normalized first and so round otherwise
    decoded, tolerance = model.decode(latents).sample, 1e-5 if kind == "bsq" else 0
    torch.testing.assert_close(decoded, plain.decode(latents).sample, rtol=0, atol=tolerance)
    codec = LatentCodec.from_pretrained(run / "codec")
    assert codec.codebook_sizes == [512] and codec.space_fingerprint == LatentCodec(plain).space_fingerprint


@pytest.mark.parametrize("network", ["AutoencoderVQ", "HierarchicalVQ"])
def test_successive_signs_train_are_saved_and_opened(network, tmp_path, make_images):
    levels = {"strides": [2, 2], "hidden_channels": 8, "residual_channels": 4, "codebook_sizes": 64}
    config = tiny_config(
        model={"class_name": network, "arguments": CONFIG if network == "AutoencoderVQ" else levels},
        codebook={"kind": "lfq-successive", "start_step": 1},
        run={"steps": 3, "log_every": 1, "calibration_images": 0},
    )
    preset, run = tmp_path / "tiny.toml", tmp_path / "run"
    preset.write_text(dump_toml(config.to_dict()))
    assert main(["train", str(preset), "--data", str(make_images), "--out", str(run)]) == 0
    codec = LatentCodec.from_pretrained(run / "codec")
    assert all(quantizer.feedback.any() for quantizer in codec.autoencoder.quantizers)
    image = randn(2, 3, 16, 24).clamp(-1, 1)
    grids = codec.encode_indices(image)
    if network == "AutoencoderVQ":
        model, plain = codec.autoencoder, VQModel.from_pretrained(run / "codec")
        latents = model.encode(image).latents
        assert torch.equal(model.quantize.assign(latents), grids[0])
        assert not torch.equal(plain.quantize(latents)[2][2].view(grids[0].shape), grids[0])
        again = plain.decode(grids[0].flatten(), force_not_quantize=True, shape=(2, 8, 12, 9)).sample
        decoded = codec.decode_indices(grids, output_type="pt")
        torch.testing.assert_close(again.clamp(-1, 1), decoded, rtol=0, atol=1e-5)
        # its encoder stays in float32
        halved = LatentCodec.from_pretrained(run / "codec", dtype=torch.float16)
        assert torch.equal(halved.encode_indices(image)[0], grids[0])
    before = codec.space_fingerprint
    codec.autoencoder.quantizers[0].feedback.data[1, 0] += 1
    codec.weights_changed()
    assert codec.space_fingerprint != before


@torch.no_grad()
def test_latents_come_to_the_grid_before_it_begins(make_images):
    """What k-means is to a learned codebook: mean 0, spread as the grid, no channel like another."""
    arguments = CONFIG | {"num_vq_embeddings": 64, "latent_channels": 8}
    config = tiny_config(
        model={"class_name": "AutoencoderVQ", "arguments": arguments}, codebook={"kind": "lfq"}
    )
    model = build_autoencoder(config)
    images = randn(8, 3, 16, 16).clamp(-1, 1)
    before = model.encode(images).latents.movedim(1, -1).flatten(0, 2)
    initialize_codebooks(model, images)
    after = model.encode(images).latents.movedim(1, -1).flatten(0, 2)
    assert before.std(0).max() < 0.8 or before.mean(0).abs().max() > 0.1
    torch.testing.assert_close(after.T.cov().diagonal().amax(), torch.tensor(1.0), atol=0.05, rtol=0)
    assert after.mean(0).abs().max() < 1e-3
    correlation = after.T.corrcoef() - torch.eye(6)
    assert correlation.abs().max() < before.T.corrcoef().sub(torch.eye(6)).abs().max() / 2
    assert model.encode_indices(images).unique().numel() > 32
    assert model.quantize.embedding.weight.abs().unique().tolist() == [1]


@pytest.mark.parametrize(
    ("codebook", "arguments", "message"),
    [
        ({"kind": "lfq"}, {"num_vq_embeddings": 1000}, "num_vq_embeddings: expected a power of two for lfq"),
        ({"kind": "fsq"}, {"num_vq_embeddings": 300}, "num_vq_embeddings: expected one of 256, 512, 1024"),
        (
            {"kind": "lfq", "values_per_channel": [4, 4]},
            {},
            'values_per_channel: expected none but for `codebook.kind="fsq"`',
        ),
        ({"kind": "vq", "entropy_weight": 0.1}, {}, "entropy_weight: expected none for a learned codebook"),
        ({"kind": "fsq", "values_per_channel": [1, 4]}, {}, "values_per_channel: expected at least 2"),
        ({"kind": "fsq"}, {"l2_normalized": True}, 'at their defaults for the quantizer "fsq"'),
    ],
)
def test_what_does_not_go_together_is_refused(codebook, arguments, message, tmp_path, make_images):
    model = {"class_name": "AutoencoderVQ", "arguments": CONFIG | arguments}
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        run_tiny(make_images, tmp_path, model=model, codebook=codebook)


def test_a_network_without_a_codebook_has_no_kind_of_it():
    config = tiny_config(codebook={"kind": "fsq"})
    with pytest.raises(SettingError, match="expected none for AutoencoderKL") as refused:
        build_autoencoder(config)
    assert refused.value.setting == "codebook.kind"


def test_a_grid_of_another_size_than_the_models_is_refused():
    with pytest.raises(ValueError, match="expected a codebook of 64 codewords of 2 numbers"):
        AutoencoderVQ(num_vq_embeddings=65, vq_embed_dim=2, quantizer="fsq", values_per_channel=(8, 8))
