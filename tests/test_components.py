"""components.py: any diffusers folder is found, checked before anything is built, and loaded with every key accounted for."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_codec import ImageClassifier, LatentCodec, PixelCNN
from latent_codec.cli import main
from latent_codec.components.codec_folders import WEIGHTS
from latent_codec.components.loading import open_component
from latent_codec.components.prior_folders import load_prior
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.context_network import IndexContext
from latent_codec.previews.preview_files import preview_path, read_preview

KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def tiny_kl(**changes) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**KL | changes).eval()


def tiny_prior() -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(codebook_size=5, hidden_channels=8, num_layers=2, kernel_size=3)


def tiny_classifier() -> ImageClassifier:
    return ImageClassifier(in_channels=3, num_classes=3, block_out_channels=(8,))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A diffusers folder, as diffusers writes it."""
    tiny_kl().save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def change_config(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def change_weights(folder: Path, **tensors) -> None:
    stored = load_file(folder / WEIGHTS)
    save_file(stored | {key.replace("__", "."): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


# ------------------------------------------------------------------------------------------- memory of its own


def shift_weights(folder: Path, offset: int) -> None:
    """Move every tensor in the file: what is mapped from it starts elsewhere."""
    stored = load_file(folder / WEIGHTS)
    save_file(stored, folder / WEIGHTS, {"padding": "x" * offset})


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("offset", [0, 8, 24])
@torch.no_grad()
def test_an_opened_codec_answers_bit_for_bit_as_the_saved_one(threads, offset, tmp_path):
    codec = LatentCodec(tiny_kl())
    codec.save_pretrained(tmp_path)
    shift_weights(tmp_path, offset)
    image = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    again = LatentCodec.from_pretrained(tmp_path)
    assert torch.equal(again.encode(image), codec.encode(image))
    assert again.fingerprint == codec.fingerprint


@pytest.mark.parametrize("offset", [0, 8, 24])
@torch.no_grad()
def test_an_opened_prior_answers_bit_for_bit_as_the_saved_one(threads, offset, tmp_path):
    prior = PixelCNN(data="pixels", data_channels=3, hidden_channels=12, num_layers=2, num_classes=3).eval()
    prior.save_pretrained(tmp_path)
    shift_weights(tmp_path, offset)
    indices = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2])
    expected = prior.logits(indices, class_labels=labels)
    for again in (load_prior(tmp_path), PixelCNN.from_pretrained(tmp_path)):
        assert torch.equal(again.logits(indices, class_labels=labels), expected)


def opened(folder: Path) -> dict[str, torch.nn.Module]:
    """One module from each of the places where weights are opened."""
    tiny_kl().save_pretrained(folder / "vae")
    tiny_prior().save_pretrained(folder / "prior")
    tiny_classifier().save_pretrained(folder / "classifier")
    IndexContext([4, 8], embedding=4, hidden=8).save_pretrained(folder / "entropy")
    AutoencoderVQ(**KL).save_pretrained(folder / "vq")
    shutil.copy(folder / "vae" / WEIGHTS, folder / "alone.safetensors")
    codec = LatentCodec.from_pretrained("default")
    return {
        "codec": LatentCodec.from_pretrained(folder / "vae").autoencoder,
        "codec by diffusers": AutoencoderVQ.from_pretrained(folder / "vq"),
        "prior": load_prior(folder),
        "classifier": open_component(folder, "classifier", [ImageClassifier]),
        "entropy": open_component(folder, "entropy", [IndexContext]),
        "preview": read_preview(preview_path("default"), codec),
    }


def test_no_loader_leaves_a_file_mapped(tmp_path):
    modules = opened(tmp_path)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    assert not mapped
    preview = modules.pop("preview")
    tensors = [preview.weight, preview.bias]
    tensors += [tensor for module in modules.values() for tensor in (*module.parameters(), *module.buffers())]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors if tensor.numel())


@torch.no_grad()
def test_default_dtype_and_device_change_nothing(folder):
    before = torch.get_default_dtype()
    expected = LatentCodec.from_pretrained(folder)
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        again = LatentCodec.from_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert {each.dtype for each in again.autoencoder.state_dict().values()} == {torch.float32}
    assert again.fingerprint == expected.fingerprint


# -------------------------------------------------------------------------------- weights that cannot be right


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float32, "decoder.conv_in.bias holds NaN or infinity"),
        (-float("inf"), torch.bfloat16, "decoder.conv_in.bias holds NaN or infinity"),
        (1e300, torch.float64, "decoder.conv_in.bias holds NaN, infinity or values beyond float32's 3.403e"),
        (7, torch.int8, "expected floating weights in decoder.conv_in.bias, got int8"),
        (True, torch.bool, "expected floating weights in decoder.conv_in.bias, got bool"),
        (1j, torch.complex64, "expected floating weights in decoder.conv_in.bias, got complex64"),
    ],
)
def test_weights_that_cannot_be_right_are_refused_by_name(value, dtype, message, folder):
    change_weights(folder, decoder__conv_in__bias=torch.full((16,), value, dtype=dtype))
    with pytest.raises(ValueError, match=message) as caught:
        LatentCodec.from_pretrained(folder)
    assert str(folder / WEIGHTS) in str(caught.value) and "\n" not in str(caught.value)


def test_integers_in_place_of_integers_are_read(tmp_path):
    context = IndexContext([4, 8], embedding=4, hidden=8)
    context.save_pretrained(tmp_path)
    again = open_component(tmp_path, "entropy", [IndexContext])
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32, torch.int64}
    for (_, expected), (_, found) in zip(context.named_buffers(), again.named_buffers()):
        assert torch.equal(found, expected)
    stored = load_file(tmp_path / WEIGHTS)
    shifts = next(key for key in stored if key.endswith("shifts"))
    change_weights(tmp_path, **{shifts.replace(".", "__"): stored[shifts].float()})
    with pytest.raises(ValueError, match=f"expected integers in {shifts}, got float32"):
        open_component(tmp_path, "entropy", [IndexContext])


@pytest.mark.parametrize(("dtype", "fits"), [("float16", False), ("bfloat16", True), ("float32", True)])
def test_weights_beyond_the_dtype_asked_for_are_refused(dtype, fits, folder, capsys):
    change_weights(folder, decoder__conv_in__bias=torch.full((16,), 1e6))
    if fits:
        LatentCodec.from_pretrained(folder, dtype=getattr(torch, dtype))
        return
    image, out = folder.parent / "a.png", folder.parent / "out"
    Image.new("RGB", (16, 16)).save(image)
    assert main(["encode", str(image), "--codec", str(folder), "--dtype", dtype, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "decoder.conv_in.bias holds NaN, infinity or values beyond float16's 6.55e+04" in error
    assert str(folder) in error and error.count("\n") == 1 and not out.exists()
