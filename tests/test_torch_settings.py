"""A codec, a prior and a preview answer the same, bit for bit, whatever the program around them has set."""

import contextlib

import pytest
import test_bitstream
import test_codec
import torch
from test_autoencoder_tiny_gn import tiny as tiny_gn

from latent_codec import LatentCodec
from latent_codec.bitstream import compress, decompress, fit_static, load_entropy_model
from latent_codec.codec_folders import WEIGHTS
from latent_codec.latent_files import load_latents, save_latents
from latent_codec.latent_space import side_multiple
from latent_codec.previews import LatentPreviewer
from latent_codec.torch_settings import ignoring_caller_settings

BUILD = {build.__name__: build for build in [*test_codec.MODELS, tiny_gn]}
CODECS = ["default", "default-vq", *test_bitstream.KINDS, *(f"diffusers {name}" for name in BUILD)]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def in_bfloat16_on_meta():
    with default_dtype(torch.bfloat16), default_device("meta"), torch.autocast("cpu", torch.bfloat16):
        yield


SETTINGS = {
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": deterministic,
    "all": in_bfloat16_on_meta,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What `LatentCodec.from_pretrained` takes, for each of CODECS; those of KINDS with an entropy model."""
    root, found = tmp_path_factory.mktemp("codecs"), {}
    for name in CODECS:
        if name in ("default", "default-vq"):
            found[name] = name
            continue
        if name in test_bitstream.KINDS:
            codec = test_bitstream.build(name)
        else:
            codec = LatentCodec(BUILD[name.split()[1]](), name=name)
        found[name] = root / name
        codec.save_pretrained(found[name])
        if name in test_bitstream.KINDS:
            fit_static(codec, [test_bitstream.picture(40, 48, seed) for seed in range(4)]).save(found[name])
    return found


def image() -> torch.Tensor:
    with ignoring_caller_settings():
        return torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * 2 - 1


def answers(codec: LatentCodec, folder) -> dict:
    """Everything that a codec says of an image, and of itself."""
    kind, photo = type(codec.autoencoder).__name__, image()
    latents = codec.encode(photo)
    found = {
        "dtype": codec.dtype,
        "space": codec.space,
        "fingerprints": (codec.space_fingerprint, codec.fingerprint),
        "parameters": codec.num_parameters,
        "latents": latents,
        "image": codec.decode(latents, size=(40, 48), output_type="pt"),
        "pil": codec.decode(latents)[0].tobytes(),
        "parts": [*codec.autoencoder.parameters(), *codec.autoencoder.buffers()],
    }
    posterior = codec.posterior(photo)
    if posterior is not None:
        found["posterior"] = [posterior.mean, posterior.var]
        seeded = torch.Generator().manual_seed(0)
        found["sampled"] = codec.encode(photo, sample=True, generator=seeded)
    if kind in ("AutoencoderKL", "AutoencoderVQ"):
        found["tiled"] = codec.decode(codec.encode(photo, tile=16), tile=16, output_type="pt")
    if codec.is_discrete:
        found["indices"] = codec.encode_indices(photo)
        found["of indices"] = codec.decode_indices(found["indices"], output_type="pt")
    found["preview"] = LatentPreviewer.full(codec, max_side=2 * side_multiple(codec.autoencoder))(latents)
    if codec.folder is not None and (codec.folder / "entropy.safetensors").is_file():
        model = load_entropy_model(codec.folder, codec=codec)
        found["bytes"] = compress(codec, photo, entropy_model=model)
        found["decompressed"] = decompress(codec, found["bytes"], entropy_model=model, output_type="pt")
        found["bits"] = decompress(codec, found["bytes"], entropy_model=model, latents=True)
    folder.mkdir(exist_ok=True)
    path = folder / "latents.safetensors"
    save_latents(path, latents, codec=codec, names=["image"], sizes=[(40, 48)])
    stored = load_latents(path, codec=codec)
    found["latent file"] = [stored.latents, stored.space_fingerprint, stored.fingerprint]
    codec.save_pretrained(folder / "codec")
    found["weight file"] = (folder / "codec" / WEIGHTS).read_bytes()
    return found


def opened(name) -> LatentCodec:
    codec = LatentCodec.from_pretrained(name)
    codec.name = "codec"
    return codec


def assert_same(found, expected, where="") -> None:
    """Equal to the bit, dtypes and devices included."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.device, found.shape) == (
            expected.dtype,
            expected.device,
            expected.shape,
        ), where
        assert not found.is_inference(), where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict | list | tuple):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        assert len(found) == len(expected), where
        for key in keys:
            assert_same(found[key], expected[key], f"{where} {key}")
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def plain(folders, tmp_path_factory):
    """What each codec answers where nothing is set."""
    root, found = tmp_path_factory.mktemp("plain"), {}

    def of(name):
        if name not in found:
            found[name] = answers(opened(folders[name]), root / name)
        return found[name]

    return of


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CODECS)
def test_a_codec_opened_and_used_under_any_setting_is_the_plain_one(name, setting, folders, plain, tmp_path):
    expected = plain(name)
    with SETTINGS[setting]():
        found = answers(opened(folders[name]), tmp_path)
    assert_same(found, expected)
