import inspect
from dataclasses import replace

import diffusers
import diffusers.models.autoencoders as autoencoders
import pytest
import torch

from latent_codec.families import FAMILIES, MODULES, REFUSED, LatentSpace, class_name_of


def tiny_kl(**config):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks, **config)


def exported_by_diffusers() -> set[str]:
    found = {name for name, each in vars(autoencoders).items() if inspect.isclass(each)}
    return found | {
        name
        for name in dir(diffusers)
        if name.startswith(("Autoencoder", "AsymmetricAutoencoder")) or name.endswith("VQModel")
    }


def test_no_class_is_both_supported_and_refused():
    assert not set(FAMILIES) & set(REFUSED)


def test_every_autoencoder_of_diffusers_is_decided_upon():
    exported = exported_by_diffusers()
    assert len(exported) >= 20
    for name in exported - set(FAMILIES):
        with pytest.raises(ValueError, match=rf"^{name} is not supported: .{{20,}}Supported classes: "):
            class_name_of(name)
    if diffusers.__version__.startswith("0.42."):
        assert exported == (set(FAMILIES) - set(MODULES)) | set(REFUSED)


def test_subclass_counts_as_its_parent_and_others_are_refused():
    class Mine(diffusers.VQModel):
        pass

    assert class_name_of(Mine) == "VQModel"
    with pytest.raises(ValueError, match="UNet2DModel is not supported: it is not an autoencoder of images"):
        class_name_of(diffusers.UNet2DModel)


def test_reads_scale_and_shift_of_kl():
    space = LatentSpace.from_config(tiny_kl(scaling_factor=0.3611, shift_factor=0.1159, latent_channels=16))
    assert space == LatentSpace(16, 2, scaling_factor=0.3611, shift_factor=0.1159)


def test_missing_shift_counts_as_none():
    assert LatentSpace.from_config(tiny_kl(shift_factor=None)).shift_factor == 0.0


def test_reads_mean_and_std_of_kl():
    space = LatentSpace.from_config(
        tiny_kl(scaling_factor=0.5, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4)
    )
    assert space.mean == (1.0, 2.0, 3.0, 4.0)
    assert space.std == (2.0, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"latent_channels": 3, "vq_embed_dim": 5, "scaling_factor": 0.2}, LatentSpace(5, 2, 0.2)),
        ({"latent_channels": 3}, LatentSpace(3, 2, 0.18215)),
    ],
)
def test_reads_vq(config, expected):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = diffusers.VQModel(block_out_channels=(8, 8), norm_num_groups=4, **blocks, **config)
    assert LatentSpace.from_config(model) == expected


def test_kandinskys_movq_is_unscaled_as_its_pipelines_take_it():
    movq = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["AttnUpDecoderBlock2D"] * 2,
        norm_type="spatial",
    )
    assert LatentSpace.from_config(movq) == LatentSpace(3, 2, 1.0)


def test_tiny_is_unscaled_by_convention():
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    assert LatentSpace.from_config(model) == LatentSpace(4, 4, 1.0, 0.0)


def test_normalize_is_the_equation_of_sd3_and_flux():
    space = LatentSpace(1, 8, scaling_factor=0.5, shift_factor=3.0)
    assert space.normalize(torch.tensor([[[[7.0]]]])).item() == 2.0
    assert space.denormalize(torch.tensor([[[[2.0]]]])).item() == 7.0


def test_normalize_is_the_equation_of_sdxl_per_channel():
    space = LatentSpace(2, 8, scaling_factor=0.5, mean=(1.0, -1.0), std=(2.0, 4.0))
    raw_latents = torch.tensor([5.0, 7.0]).view(1, 2, 1, 1)
    assert space.normalize(raw_latents).flatten().tolist() == [1.0, 1.0]
    assert torch.equal(space.denormalize(space.normalize(raw_latents)), raw_latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "space",
    [
        LatentSpace(4, 8, 0.18215),
        LatentSpace(4, 8, 1.5305, 0.0609),
        LatentSpace(4, 8, 0.5, mean=(-1.6, 1.2, 0.1, 0.0), std=(8.4, 5.4, 6.0, 7.0)),
    ],
)
def test_denormalize_inverts_normalize_and_keeps_dtype(space, dtype):
    raw_latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    latents = space.normalize(raw_latents)
    assert latents.dtype == space.denormalize(latents).dtype == dtype
    # Four roundings of values up to about 16.
    tolerance = 4 * 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(space.denormalize(latents), raw_latents, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "space",
    [LatentSpace(4, 2, 0.7, 0.2), LatentSpace(4, 2, 0.5, mean=(0.1,) * 4, std=(2.0,) * 4)],
)
def test_config_round_trip(space, tmp_path):
    tiny_kl(**space.to_config()).save_pretrained(tmp_path)
    assert LatentSpace.from_config(diffusers.AutoencoderKL.from_pretrained(tmp_path)) == space


def test_to_config_writes_a_shift_that_sd3_can_add():
    assert LatentSpace(4, 8).to_config()["shift_factor"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0; it must be a positive number"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"shift_factor": float("inf")}, "shift_factor is inf"),
        ({"mean": (0.0,) * 4}, "go together"),
        (
            {"mean": (0.0,) * 3, "std": (1.0,) * 3},
            "expected 4 entries of latents_mean and latents_std, one per channel, got 3 and 3",
        ),
        ({"mean": (0.0,) * 4, "std": (1.0, 1.0, 0.0, 1.0)}, "every entry must be a positive number"),
        ({"mean": (0.0,) * 4, "std": (1.0,) * 4, "shift_factor": 0.1}, "two conventions"),
    ],
)
def test_refuses_impossible_spaces(change, message):
    with pytest.raises(ValueError, match=message):
        replace(LatentSpace(4, 8), **change)
