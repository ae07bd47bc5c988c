"""Latents that other programs cached become a data set: kohya's scripts, arrays, tensors, with a stated space."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latent_codec import LatentCodec, LatentDataset, SettingError
from latent_codec.latents.importing import import_latents
from latent_codec.latents.plan import EncodingOptions

BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return LatentCodec(diffusers.AutoencoderKL(scaling_factor=0.5, shift_factor=0.25, **BLOCKS), name="mine")


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def normalized(raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((raw - 0.25) * 0.5)


def by_key(folder, **settings) -> dict:
    dataset = LatentDataset(folder, **settings)
    return {sample["key"]: sample for sample in dataset}


def save_kohya(path, seed, shape, *, end="", flipped=False) -> None:
    """As sd-scripts' strategy_base.py writes it: sizes are (width, height), the crop is left, top, right, bottom."""
    arrays = {
        f"latents{end}": values(seed, 4, *shape),
        f"original_size{end}": np.array([60, 40]),
        f"crop_ltrb{end}": np.array([3, 0, 43, 40]),
    }
    if flipped:
        arrays[f"latents_flipped{end}"] = values(seed + 100, 4, *shape)
    np.savez(path, **arrays)


def test_kohyas_caches_with_captions_flips_and_sizes(codec, tmp_path):
    data = tmp_path / "train"
    data.mkdir()
    save_kohya(data / "cat_0060x0040_sd.npz", 1, (8, 12), flipped=True)
    save_kohya(data / "a.dog_0060x0040_sdxl.npz", 2, (12, 8), flipped=True)
    save_kohya(data / "old.npz", 3, (8, 8), flipped=True)
    np.savez(data / "cat_te_outputs.npz", hidden_state1=np.zeros(3))
    (data / "cat.txt").write_text("a cat\n")
    (data / "a.dog.caption").write_text("a dog")
    index = import_latents(codec, [data], tmp_path / "latents")
    assert (index["images"], index["samples"], index["skipped_files"]) == (3, 6, [])
    found = by_key(tmp_path / "latents", codec=codec)
    cat = found["cat"]
    torch.testing.assert_close(cat["latents"], normalized(values(1, 4, 8, 12)))
    assert (
        cat["caption"] == "a cat" and found["a_dog"]["caption"] == "a dog" and found["old"]["caption"] == ""
    )
    assert (cat["size"].tolist(), cat["crop"].tolist()) == ([40, 60], [0, 3, 16, 24])
    torch.testing.assert_close(found["cat-flipped"]["latents"], normalized(values(101, 4, 8, 12)))
    assert [found[key]["flipped"] for key in ("cat", "cat-flipped")] == [False, True]


def test_kohyas_caches_of_flux_are_scaled_and_may_hold_several_sizes(codec, tmp_path):
    path = tmp_path / "cat_0060x0040_flux.npz"
    save_kohya(path, 1, (8, 12), end="_8x12")
    with np.load(path) as found:
        both = dict(found)
    save_kohya(path, 2, (4, 6), end="_4x6")
    with np.load(path) as found:
        np.savez(path, **both | dict(found))
    import_latents(codec, [path], tmp_path / "latents")
    found = by_key(tmp_path / "latents")
    assert np.array_equal(found["cat-000000"]["latents"], values(1, 4, 8, 12))
    assert np.array_equal(found["cat-000001"]["latents"], values(2, 4, 4, 6))


def test_plain_arrays_and_tensors_need_to_be_told_raw_or_scaled(codec, tmp_path):
    data = tmp_path / "data"
    for kind in ("cat", "dog"):
        (data / kind).mkdir(parents=True)
    np.save(data / "cat" / "one.npy", values(1, 4, 8, 8))
    np.save(data / "dog" / "two.npy", values(2, 3, 4, 8, 8))
    torch.save({"latents": torch.from_numpy(values(3, 4, 8, 8))}, data / "dog" / "three.pt")
    save_file({"latents": torch.from_numpy(values(4, 1, 4, 8, 8))}, data / "dog" / "four.safetensors")
    with pytest.raises(
        SettingError, match=r'values: expected "raw".* or "scaled".* which one\.npy does not tell'
    ):
        import_latents(codec, [data], tmp_path / "latents")
    index = import_latents(codec, [data], tmp_path / "latents", values="scaled")
    assert index["samples"] == 6
    found = by_key(tmp_path / "latents")
    assert np.array_equal(found["cat/one"]["latents"], values(1, 4, 8, 8))
    assert np.array_equal(found["dog/two-000002"]["latents"], values(2, 3, 4, 8, 8)[2])
    assert np.array_equal(found["dog/three"]["latents"], values(3, 4, 8, 8))
    assert [found[key]["label"] for key in ("cat/one", "dog/four")] == [0, 1]
    assert found["cat/one"]["size"].tolist() == [16, 16]
    again = import_latents(
        codec, [data], tmp_path / "raw", EncodingOptions(container="parquet"), values="raw"
    )
    assert again["container"] == "parquet"
    torch.testing.assert_close(by_key(tmp_path / "raw")["cat/one"]["latents"], normalized(values(1, 4, 8, 8)))


def test_means_and_log_variances_are_a_posterior(codec, tmp_path):
    np.save(tmp_path / "a.npy", values(1, 8, 8, 8))
    index = import_latents(codec, [tmp_path / "a.npy"], tmp_path / "latents", values="raw")
    assert index["options"]["posterior"] == "both"
    torch.testing.assert_close(
        by_key(tmp_path / "latents", sample=False)["a"]["latents"], normalized(values(1, 8, 8, 8)[:4])
    )
    dataset = LatentDataset(tmp_path / "latents")
    expected = values(1, 8, 8, 8)[4:] + 2 * np.log(0.5)
    np.testing.assert_allclose(dataset.read(0)[1]["logvar"], expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_read_is_left_out_and_listed_and_a_second_run_adds_nothing(codec, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "a.npy", values(1, 4, 8, 8))
    np.save(data / "b.npy", values(1, 5, 8, 8))
    np.save(data / "c.npy", np.full((4, 8, 8), np.nan, np.float32))
    (data / "d.npz").write_bytes(b"PK\x03\x04 damaged")
    index = import_latents(codec, [data], tmp_path / "latents", values="scaled")
    assert index["samples"] == 1
    b, c, d = index["skipped_files"]
    assert (
        b
        == "b.npy: is a NumPy array (.npy) of (5, 8, 8) float32; expected floating-point latents (C, h, w) or (N, C, h, w) with C = 4 or 8"
    )
    assert c == "c.npy: its values are not finite, or overflow torch.float32"
    assert "damaged or truncated zip file" in d
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*")}
    import_latents(codec, [data], tmp_path / "latents", values="scaled")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*")} == before
    with pytest.raises(ValueError, match=r"expected files of latents .* got none in"):
        import_latents(codec, [tmp_path / "latents" / "shards"], tmp_path / "other")
    with pytest.raises(ValueError, match="no latents of mine in 1 files; the first: "):
        import_latents(codec, [data / "b.npy"], tmp_path / "other", values="raw")
