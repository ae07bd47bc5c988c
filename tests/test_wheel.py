"""The package as it is installed from a wheel, far from the checkout."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT
from helpers.processes import run_forked

PACKAGES = {"latent_codec": "latent_codec", "pipelines": "latent_codec", "conversion": "latent_codec"}
"""Folders of the checkout, and where they go to."""

RUN = """
import runpy, sys
target, root, *sys.argv = sys.argv[1:]
sys.path[:] = [target, *(path for path in sys.path if path != root)]
import latent_codec
assert latent_codec.__file__.startswith(target), latent_codec.__file__
import latent_codec.pipelines, latent_codec.conversion
for package in (latent_codec.pipelines, latent_codec.conversion):
    assert package.__file__.startswith(target), package.__file__
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def pip(*arguments) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the checkout, which building leaves files in."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    options = ("--no-deps", "--no-build-isolation", "--quiet")
    pip("wheel", *options, "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_every_file_of_the_packages(wheel):
    expected = {
        (
            path.relative_to(ROOT) if name == "latent_codec" else "latent_codec" / path.relative_to(ROOT)
        ).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())


def test_a_wheel_that_is_installed_elsewhere_runs(wheel, tmp_path):
    pip("install", "--no-deps", "--quiet", "--target", tmp_path / "site", wheel)
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "site" / "bin" / "latent-codec"
    done = run_forked(RUN, tmp_path / "site", ROOT, script, "roundtrip", cwd=tmp_path / "elsewhere")
    assert "PSNR" in done.stdout and any((tmp_path / "elsewhere").rglob("*.png"))
