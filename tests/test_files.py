"""Files that are complete or absent."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from latent_codec.files import replacing


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_weights_are_readable_by_whom_the_umask_lets(tmp_path, umask, name):
    """safetensors alone leaves 0600, and a codec in a shared folder could not be opened."""
    with replacing(tmp_path / name) as new:
        weights = new
        if name == "folder":
            weights = new / "vae" / "weights.safetensors"
            weights.parent.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, weights)
    (written,) = tmp_path.rglob("*.safetensors")
    assert mode(written) == 0o666 & ~umask
    assert sorted(tmp_path.iterdir()) == [tmp_path / name]


def test_what_fails_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as new:
        new.mkdir()
        (new / "half").write_text("ha")
        raise OSError("disk full")
    assert [each.name for each in tmp_path.rglob("*")] == ["folder", "old"]


@pytest.mark.parametrize("name", ["folder", "replaced"])
def test_a_folder_is_swapped(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    (path / "old").write_text("old")
    with replacing(path) as new:
        new.mkdir()
        (new / "new").write_text("new")
    assert [each.name for each in tmp_path.rglob("*")] == [name, "new"]
