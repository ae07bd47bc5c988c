from dataclasses import fields

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from latent_codec import LatentCodec
from latent_codec.bitstream import (
    CorruptError,
    PartialWarning,
    StaticEntropy,
    TruncatedError,
    WrongCodecError,
    WrongEntropyModelError,
    compress,
    decompress,
    fit_static,
    load_entropy_model,
    prepare,
    read,
    unpack,
)
from latent_codec.bitstream.compression import tile_for
from latent_codec.bitstream.container import Header, Level
from latent_codec.bitstream.entropy_model import Prediction
from latent_codec.bitstream.quantization import quantize, reconstruct
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.hierarchical_vq import HierarchicalVQ

BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "mid_block_add_attention": False,
}
KINDS = ["kl", "vq", "hierarchical"]


def build(kind: str, seed: int = 0) -> LatentCodec:
    torch.manual_seed(seed)
    if kind == "kl":
        codec = LatentCodec(diffusers.AutoencoderKL(**BLOCKS, latent_channels=3, shift_factor=0.5), name=kind)
    elif kind == "vq":
        codec = LatentCodec(AutoencoderVQ(**BLOCKS, latent_channels=3, num_vq_embeddings=24), name=kind)
    else:
        model = HierarchicalVQ(
            strides=(2, 2),
            hidden_channels=8,
            num_residual_blocks=1,
            residual_channels=4,
            embed_dim=4,
            codebook_sizes=(6, 24),
        )
        codec = LatentCodec(model, name=kind)
    for level, quantizer in enumerate(getattr(codec.autoencoder, "quantizers", [])):
        spread_codewords(codec.autoencoder, level, quantizer.embedding.weight)
    codec.weights_changed()
    return codec


@torch.no_grad()
def spread_codewords(autoencoder, level: int, codewords: torch.Tensor) -> None:
    """Make codewords of what the encoder gives here and there, so that an untrained one uses them all."""
    latents = autoencoder.encode_quantized(make_image(64, 64, 100)[None])[level].latents
    codewords.copy_(
        latents.movedim(1, -1).flatten(0, 2)[:: latents[0, 0].numel() // len(codewords)][: len(codewords)]
    )


def make_image(height: int, width: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    """Smooth noise, (channels, H, W) in [-1, 1]."""
    noise = torch.randn(
        1, channels, height // 4 + 2, width // 4 + 2, generator=torch.Generator().manual_seed(seed)
    )
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0].clamp(-1, 1)


@pytest.fixture(scope="module")
def codecs():
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(codecs):
    images = [make_image(40, 48, seed) for seed in range(4)]
    return {kind: fit_static(codec, images) for kind, codec in codecs.items()}


def options(kind: str, model) -> dict:
    return {"entropy_model": model} | ({"quality": 60} if kind == "kl" else {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (33, 47), (64, 5)])
@pytest.mark.parametrize("tile", [None, 16, 1024])
def test_round_trip(codecs, models, kind, size, tile):
    codec, model = codecs[kind], models[kind]
    image = make_image(*size)
    data = compress(codec, image, **options(kind, model), tile=tile)
    assert compress(codec, image, **options(kind, model), tile=tile) == data
    found = decompress(codec, data, entropy_model=model, latents=True)
    pixels = decompress(codec, data, entropy_model=model, output_type="pt")
    assert pixels.shape == image.shape
    if kind == "kl":
        latents = codec.encode(image)
        assert found.shape == latents.shape and found.dtype == latents.dtype
        steps = torch.from_numpy(model.step_sizes[60]).view(1, -1, 1, 1)
        assert ((found - latents).abs() / steps).max() <= 1.001
        torch.testing.assert_close(pixels, codec.decode(found, size=size, output_type="pt")[0])
    else:
        grids = codec.encode_indices(image)
        assert len(found) == len(grids) and all(map(torch.equal, found, grids))
        torch.testing.assert_close(pixels, codec.decode_indices(grids, size=size, output_type="pt")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_and_lanes_change_no_value(codecs, models, kind):
    codec, model = codecs[kind], models[kind]
    image = make_image(50, 70)
    found = [
        read(codec, compress(codec, image, **options(kind, model), tile=tile), entropy_model=model)
        for tile in (None, 8, 16, 32)
    ]
    assert [each.container.header.num_tiles for each in found[:3]] == [1, 63, 20]
    for other in found[1:]:
        for values, expected in zip(other.values, found[0].values, strict=True):
            np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_payload_is_near_the_models_own_bits(codecs, models, kind):
    codec, model = codecs[kind], models[kind]
    data = compress(codec, make_image(160, 160), **options(kind, model))
    found = read(codec, data, entropy_model=model)
    ideal = found.code_length / 8
    assert found.container.header_bytes <= 64
    assert ideal <= len(data) - found.container.header_bytes <= 1.005 * ideal + 64


class Counting(StaticEntropy):
    """Counts how often a tile is predicted."""

    count = 0

    def predictor(self, shapes, step_size_index):
        Counting.count += 1
        return super().predictor(shapes, step_size_index)


def test_a_file_is_predicted_once_to_be_written_and_once_to_be_read(codecs, models):
    codec, image = codecs["kl"], make_image(20, 30)
    model = Counting(**{each.name: getattr(models["kl"], each.name) for each in fields(StaticEntropy)})
    data, decoded = prepare(codec, image, entropy_model=model).compress_and_read(quality=60)
    found = decoded.image(output_type="pt")
    assert Counting.count == 2 and decoded.code_length > 0
    assert data == compress(codec, image, entropy_model=models["kl"], quality=60)
    assert torch.equal(found, decompress(codec, data, entropy_model=models["kl"], output_type="pt"))
    assert torch.equal(decoded.latents(), decompress(codec, data, entropy_model=models["kl"], latents=True))


def test_fixed_length_needs_no_model_and_is_chosen_where_smaller(codecs, models):
    codec, model = codecs["vq"], models["vq"]
    image = make_image(32, 32)
    fixed = compress(codec, image)
    assert unpack(fixed).header.entropy_fingerprint is None
    assert sum(unpack(fixed).lengths) == 16 * 16 * 5 // 8
    assert torch.equal(decompress(codec, fixed, latents=True)[0], codec.encode_indices(image)[0])

    coded = compress(codec, make_image(96, 96), entropy_model=model)
    assert unpack(coded).header.entropy_fingerprint == model.fingerprint
    assert len(coded) < len(compress(codec, make_image(96, 96)))
    assert compress(codec, make_image(2, 2), entropy_model=model) == compress(codec, make_image(2, 2))


def test_finer_steps_cost_more_and_come_nearer(codecs, models):
    codec, model = codecs["kl"], models["kl"]
    image = make_image(64, 64)
    latents = codec.encode(image)
    sizes, errors = [], []
    for quality in (0, 32, 64, model.num_step_sizes - 1):
        data = compress(codec, image, entropy_model=model, quality=quality)
        sizes.append(len(data))
        errors.append(
            (decompress(codec, data, entropy_model=model, latents=True) - latents).square().mean().item()
        )
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert sizes[-1] > 2 * sizes[0] and errors[-1] < errors[0] / 100


def rounded(model: StaticEntropy, latents: np.ndarray, step_size_index: int) -> np.ndarray:
    return np.round(latents / model.step_sizes[step_size_index][:, None, None]).astype(np.int64)


def reconstructed(model: StaticEntropy, levels: np.ndarray, step_size_index: int) -> np.ndarray:
    found = model.predictor([levels.shape], step_size_index).predict(0, [levels])
    shaped = Prediction(found.cdf_index.reshape(levels.shape), found.offsets.reshape(levels.shape))
    return reconstruct(model, levels, shaped, step_size_index)


def test_levels_come_back_as_the_mean_of_their_latents(codecs, models):
    """Shifts move towards the densest part: the error is below that of midpoints on the images fitted to."""
    codec, model = codecs["kl"], models["kl"]
    errors = {True: 0.0, False: 0.0}
    for seed in range(4):
        latents = codec.encode(make_image(40, 48, seed))[0].numpy()
        levels = rounded(model, latents, 8)
        steps = model.step_sizes[8][:, None, None]
        errors[True] += np.square(reconstructed(model, levels, 8) - latents).sum()
        errors[False] += np.square(levels * steps - latents).sum()
    assert errors[True] < errors[False]


def test_latents_far_beyond_the_fitted_range_escape(models):
    model = models["kl"]
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    levels, _ = quantize(model, latents[0].numpy(), 90)
    error = (
        np.abs(reconstructed(model, levels, 90) - latents[0].numpy()) / model.step_sizes[90][:, None, None]
    )
    assert error.max() <= 1.001
    numbers = model.predictor([levels.shape], 90).predict(0, [levels]).cdf_index
    symbols, escape_bits = model.tables.entries(levels.reshape(-1), numbers)
    assert len(escape_bits) > 64
    found, rest = model.tables.symbols(symbols, numbers, escape_bits)
    np.testing.assert_array_equal(found, levels.reshape(-1))
    assert not rest


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_half_precision_codecs(models, kind):
    codec = build(kind)
    codec.space_fingerprint  # noqa: B018  of the weights before they are rounded
    codec.autoencoder.to(torch.bfloat16)
    image = make_image(16, 16)
    data = compress(codec, image, **options(kind, models[kind]))
    found = decompress(codec, data, entropy_model=models[kind], latents=True)
    assert found.dtype == torch.bfloat16 if kind == "kl" else found[0].dtype == torch.int64


def test_a_fine_tuned_decoder_reads_the_file_and_another_codec_does_not(codecs, models):
    data = compress(codecs["kl"], make_image(16, 16), **options("kl", models["kl"]))
    tuned = build("kl")
    with torch.no_grad():
        tuned.autoencoder.decoder.conv_out.bias += 0.1
    tuned.weights_changed()
    assert tuned.fingerprint != codecs["kl"].fingerprint
    decompress(tuned, data, entropy_model=models["kl"])
    with pytest.raises(WrongCodecError, match=codecs["kl"].space_fingerprint):
        decompress(build("kl", seed=1), data, entropy_model=models["kl"])
    with pytest.raises(ValueError, match="the entropy model was fitted to"):
        compress(build("kl", seed=1), make_image(16, 16), **options("kl", models["kl"]))


def test_wrong_entropy_models(codecs, models):
    codec = codecs["kl"]
    data = compress(codec, make_image(16, 16), **options("kl", models["kl"]))
    with pytest.raises(WrongEntropyModelError, match="got none"):
        decompress(codec, data)
    other = fit_static(codec, [make_image(40, 40, 9)])
    with pytest.raises(
        WrongEntropyModelError, match=f"{models['kl'].fingerprint}, not with {other.fingerprint}"
    ):
        decompress(codec, data, entropy_model=other)


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("kl", {"entropy_model": None}, "entropy_model: expected one for latents of kl"),
        ("kl", {"quality": 1, "target_bytes": 900}, "quality or target_bytes, got both"),
        (
            "kl",
            {"quality": None, "target_bytes": 30},
            r"target_bytes: expected at least \d+ bytes for this image, got 30",
        ),
        ("vq", {"target_bytes": 30}, "bytes for indices, got 30"),
        ("hierarchical", {"target_bytes": 30}, "for the first level of indices"),
        ("kl", {"rate_weight": -1}, "rate_weight: expected at least 0, got -1"),
        ("kl", {"quality": 101}, r"quality: expected 0 \(coarsest\) to 100 .*, got 101"),
        ("vq", {"quality": 3}, "quality: expected none for vq"),
        ("vq", {"tile": 3}, "positive multiple of 2"),
        ("hierarchical", {"tile": 0}, "positive multiple of 4"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(codecs, models, kind, changes, words):
    with pytest.raises(ValueError, match=words):
        compress(codecs[kind], make_image(8, 8), **(options(kind, models[kind]) | changes))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_loss_of_a_section_is_confined_to_its_tile_and_flagged(codecs, models, kind):
    codec, model = codecs[kind], models[kind]
    image = make_image(48, 32)
    data = compress(codec, image, **options(kind, model), tile=16)
    container = unpack(data)
    damaged = bytearray(data)
    damaged[container.header_bytes + container.lengths[0]] ^= 1  # tile 1: top right
    with pytest.raises(CorruptError, match="tile 1"):
        decompress(codec, bytes(damaged), entropy_model=model)
    with pytest.warns(PartialWarning, match=r"section 1 \(layer 0, tile 1\)"):
        found = decompress(codec, bytes(damaged), entropy_model=model, latents=True, partial=True)
    whole = decompress(codec, data, entropy_model=model, latents=True)
    found, whole = (each if kind == "kl" else each[0][:, None] for each in (found, whole))
    lost = torch.zeros(24, 16, dtype=torch.bool)
    lost[:8, 8:] = True
    expected = torch.tensor(0)  # a small image's indices are of fixed length, without an opinion
    assert (container.header.entropy_fingerprint is None) == (kind == "vq")
    if kind == "kl":
        most_probable = model.tables.most_probable[60 * 3 : 61 * 3]
        expected = torch.from_numpy(reconstructed(model, most_probable[:, None, None], 60))[None]
    assert torch.equal(found[..., ~lost], whole[..., ~lost])
    assert torch.equal(found[..., :8, 8:], expected.expand_as(found[..., :8, 8:]))
    with pytest.warns(PartialWarning):
        pixels = decompress(codec, bytes(damaged), entropy_model=model, partial=True, output_type="pt")
    assert not pixels[:, :16, 16:].any() and pixels[:, 16:].any()
    with pytest.warns(PartialWarning, match="2 bytes after"):
        decompress(codec, data + b"12", entropy_model=model, partial=True)


def test_the_first_pass_of_levels_is_a_preview(codecs, models):
    codec, model = codecs["hierarchical"], models["hierarchical"]
    image = make_image(32, 32)
    data = compress(codec, image, entropy_model=model)
    container = unpack(data)
    first = data[: container.header_bytes + container.lengths[0]]
    with pytest.raises(TruncatedError, match="Partial"):
        decompress(codec, first, entropy_model=model)
    with pytest.warns(PartialWarning, match="layer 1"):
        pixels = decompress(codec, first, entropy_model=model, partial=True, output_type="pt")
    expected = codec.decode_indices(codec.encode_indices(image)[:1], output_type="pt")[0]
    torch.testing.assert_close(pixels, expected)
    with pytest.raises(TruncatedError):
        decompress(codec, first[:-1], entropy_model=model, partial=True)


def test_one_tile_of_two_may_lack_its_lower_level(codecs, models):
    codec, model = codecs["hierarchical"], models["hierarchical"]
    data = compress(codec, make_image(16, 32), entropy_model=model, tile=16)
    cut = data[: -unpack(data).lengths[-1]]
    with pytest.warns(PartialWarning, match=r"section 3 \(layer 1, tile 1\)"):
        pixels = decompress(codec, cut, entropy_model=model, partial=True, output_type="pt")
    whole = decompress(codec, data, entropy_model=model, output_type="pt")
    torch.testing.assert_close(pixels[..., :4], whole[..., :4])
    assert not torch.allclose(pixels[..., 20:], whole[..., 20:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sidecar_comes_back(codecs, models, kind, tmp_path):
    codec, model = codecs[kind], models[kind]
    model.save(tmp_path)
    stored = load_entropy_model(tmp_path, codec=codec)
    assert stored.fingerprint == model.fingerprint
    data = compress(codec, make_image(20, 20), **options(kind, model))
    assert (
        read(codec, data, entropy_model=stored).container.header.space_fingerprint == codec.space_fingerprint
    )
    with pytest.raises(ValueError, match=rf"entropy.safetensors was fitted to {kind} .*, not to {kind}"):
        load_entropy_model(tmp_path, codec=build(kind, seed=1))


def test_damaged_sidecars_are_refused(models, tmp_path):
    path = tmp_path / "entropy.safetensors"
    models["kl"].save(path)
    arrays = load_file(path)
    metadata = {
        "format": "latent-codec-entropy",
        "version": "1",
        "kind": "static",
        "codec": "kl",
        "space_fingerprint": models["kl"].space_fingerprint,
    }
    save_file(arrays, path, metadata)
    assert load_entropy_model(path).fingerprint == models["kl"].fingerprint
    for changed, changed_metadata in [
        ({**arrays, "starts": np.zeros_like(arrays["starts"])}, metadata),
        ({**arrays, "steps": -arrays["steps"]}, metadata),
        ({**arrays, "steps": arrays["steps"] * np.float32(np.nan)}, metadata),
        ({**arrays, "more": arrays["steps"]}, metadata),
        ({name: array for name, array in arrays.items() if name != "shifts"}, metadata),
        ({name: array for name, array in arrays.items() if name != "sizes"}, metadata),
        (arrays, metadata | {"version": "2"}),
        (arrays, metadata | {"format": "latent-codec"}),
        (arrays, {}),
    ]:
        save_file(changed, path, changed_metadata)
        with pytest.raises(ValueError, match="is no entropy model"):
            load_entropy_model(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no entropy model"):
        load_entropy_model(path)
    with pytest.raises(FileNotFoundError):
        load_entropy_model(tmp_path / "nothing.safetensors")


def test_fitting_needs_images(codecs):
    for codec in codecs.values():
        with pytest.raises(ValueError, match="at least one image"):
            fit_static(codec, [])


def test_pixels_are_not_decoded_for_latents(codecs, models, monkeypatch):
    data = {kind: compress(codecs[kind], make_image(16, 16), **options(kind, models[kind])) for kind in KINDS}

    def refuse(*arguments, **keywords):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(LatentCodec, "decode", refuse)
    monkeypatch.setattr(LatentCodec, "decode_indices", refuse)
    for kind in KINDS:
        decompress(codecs[kind], data[kind], entropy_model=models[kind], latents=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("region", [(0, 0, 16, 16), (20, 5, 30, 11), (63, 47, 1, 1), (0, 0, 64, 48)])
def test_a_region_is_decoded_from_its_tiles_alone(codecs, models, kind, region):
    codec, model = codecs[kind], models[kind]
    image = make_image(64, 48)
    data = compress(codec, image, **options(kind, model), tile=16)
    header = unpack(data).header
    found = read(codec, data, entropy_model=model, region=region)
    top, left, height, width = region
    whole = read(codec, data, entropy_model=model)
    for level, (part, values) in enumerate(zip(found.values, whole.values)):
        side = header.levels[level].side
        rows = slice(found.container.top // side, found.container.top // side + part.shape[1])
        columns = slice(found.container.left // side, found.container.left // side + part.shape[2])
        np.testing.assert_array_equal(part, values[:, rows, columns])
    assert found.container.top <= top and found.container.top + found.container.header.height >= top + height
    assert (
        found.container.left <= left and found.container.left + found.container.header.width >= left + width
    )
    pixels = decompress(codec, data, entropy_model=model, region=region, output_type="pt")
    assert pixels.shape[1:] == (height, width)
    if region == (0, 0, 64, 48):
        torch.testing.assert_close(pixels, decompress(codec, data, entropy_model=model, output_type="pt"))


def test_damage_elsewhere_does_not_reach_a_region(codecs, models):
    codec, model = codecs["kl"], models["kl"]
    data = bytearray(compress(codec, make_image(64, 48), entropy_model=model, quality=40, tile=16))
    data[-1] ^= 1  # the last tile
    with pytest.raises(CorruptError, match="tile 11"):
        decompress(codec, bytes(data), entropy_model=model)
    decompress(codec, bytes(data), entropy_model=model, region=(0, 0, 20, 20))
    with pytest.raises(CorruptError, match="tile 11"):
        decompress(codec, bytes(data), entropy_model=model, region=(60, 40, 4, 8))
    for outside in ((0, 0, 65, 4), (-1, 0, 4, 4), (0, 48, 1, 1), (3, 3, 0, 3)):
        with pytest.raises(ValueError, match="within the image of 64x48"):
            decompress(codec, bytes(data), entropy_model=model, region=outside)
    with pytest.raises(ValueError, match="None where latents are asked for"):
        decompress(codec, bytes(data), entropy_model=model, region=(0, 0, 4, 4), latents=True)


def test_a_sidecar_in_the_codecs_folder_is_found(codecs, models, tmp_path):
    codecs["kl"].save_pretrained(tmp_path)
    codec = LatentCodec.from_pretrained(tmp_path)
    image = make_image(32, 24)
    with pytest.raises(ValueError, match="entropy_model: expected one for latents"):
        compress(codec, image, quality=30)
    models["kl"].save(tmp_path)
    data = compress(codec, image, quality=30)
    assert data == compress(codecs["kl"], image, entropy_model=models["kl"], quality=30)
    assert decompress(codec, data).size == (24, 32)
    with pytest.raises(WrongEntropyModelError, match="got none"):
        decompress(codecs["kl"], data)


@pytest.mark.parametrize("tile", [48, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_decoded_one_by_one_give_the_image(codecs, models, kind, tile):
    """The hierarchical codec sees less than MARGIN around a pixel and has no group norm, so that its tiles are exact."""
    codec, model = codecs[kind], models[kind]
    data = compress(codec, make_image(150, 210), **options(kind, model), tile=32)
    whole = decompress(codec, data, entropy_model=model, output_type="pt")
    calls = []
    found = decompress(
        codec,
        data,
        entropy_model=model,
        output_type="pt",
        tile=tile,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    num_tiles = -(-150 // tile) * -(-210 // tile)
    assert calls == [(done, num_tiles) for done in range(num_tiles)]
    assert found.shape == whole.shape
    if kind == "hierarchical":
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)  # sums of other groups of pixels
    else:
        assert (found - whole).abs().mean() < 0.1
    image = decompress(codec, data, entropy_model=model, tile=tile)
    assert image.size == (210, 150) and image.mode == "RGB"
    pixels = torch.from_numpy(np.asarray(image).copy()).movedim(2, 0)
    assert (pixels - (found + 1) * 127.5).abs().max() <= 3  # rounded at each blend
    region = decompress(codec, data, entropy_model=model, tile=tile, region=(0, 0, 150, 210))
    np.testing.assert_array_equal(region, image)


def test_a_tile_that_is_lost_is_gray_in_an_image_of_tiles(codecs, models):
    codec, model = codecs["kl"], models["kl"]
    data = bytearray(compress(codec, make_image(160, 160), entropy_model=model, quality=40, tile=80))
    data[-1] ^= 1  # the last tile, which begins at (80, 80)
    with pytest.warns(PartialWarning, match="tile 3"):
        found = decompress(codec, bytes(data), entropy_model=model, partial=True, output_type="pt", tile=64)
    assert (found[:, 80:, 80:] == 0).all()
    assert found[:, :80].std() > 0


@pytest.mark.parametrize("tile", [0, -16, 3])
def test_a_tile_that_fits_no_position_is_refused(codecs, models, tile):
    data = compress(codecs["kl"], make_image(32, 24), entropy_model=models["kl"], quality=30)
    with pytest.raises(ValueError, match=f"multiple of 2 pixels, or None, got {tile}"):
        decompress(codecs["kl"], data, entropy_model=models["kl"], tile=tile)


def test_large_images_have_a_tile_and_others_none():
    level = {"kl": (Level(side=8, channels=4),), "odd": (Level(side=12, channels=1),)}
    outline = {"num_layers": 1, "space_fingerprint": "0" * 16, "entropy_fingerprint": "0" * 16}
    for kind, height, width, tile in (
        ("kl", 2048, 2048, None),
        ("kl", 2048, 2056, 1024),
        ("odd", 8192, 8192, 1020),
    ):
        assert tile_for(Header(height=height, width=width, levels=level[kind], tile=32, **outline)) == tile
