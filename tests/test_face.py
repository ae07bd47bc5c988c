"""What `import latent_codec` offers, at run time and to type checkers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import latent_codec

OFFERED = [
    "LatentCodec",
    "LatentSpace",
    "SettingError",
    "AutoencoderVQ",
    "HierarchicalVQ",
    "AutoencoderTinyGN",
    "AutoencoderKLOtherDecoder",
    "PixelCNN",
    "PixelSNAIL",
    "ImageClassifier",
    "compress",
    "decompress",
    "convert",
    "evaluate",
    "extract_features",
    "train",
    "calibrate",
    "LatentPreviewer",
    "LatentPreviewCallback",
    "PriorPipeline",
    "HierarchicalPriorPipeline",
]


def test_the_face_offers_what_people_look_for():
    assert set(OFFERED) <= set(latent_codec.__all__)
    for name in OFFERED:
        assert getattr(latent_codec, name).__name__ == name


def test_type_checkers_see_the_names_that_are_there_at_run_time():
    tree = ast.parse(Path(latent_codec.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))
    seen = {alias.name: each.module for each in block.body for alias in each.names}
    assert seen == latent_codec._EXPORTS


def test_mypy_knows_the_face(tmp_path):
    """As an importer's mypy sees an installed package, whose folders are where their names say."""
    pytest.importorskip("mypy", reason="needs mypy ([test])")
    package = tmp_path / "latent_codec"
    package.mkdir()
    for path in (*(ROOT / "latent_codec").iterdir(), ROOT / "pipelines", ROOT / "conversion"):
        (package / path.name).symlink_to(path)
    assert (package / "py.typed").is_file()
    lines = [
        "import latent_codec",
        "from latent_codec import LatentCodec",
        "reveal_type(LatentCodec.from_pretrained())",
        *(f"reveal_type(latent_codec.{name})" for name in OFFERED),
    ]
    (tmp_path / "importer.py").write_text("\n".join(lines) + "\n")
    options = ["--strict", "--no-site-packages", "--ignore-missing-imports", "--follow-imports", "silent"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "importer.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    first, *others = re.findall(r'Revealed type is "(.*)"', run.stdout)
    assert first == "latent_codec.codec.LatentCodec"
    unknown = [name for name, revealed in zip(OFFERED, others, strict=True) if revealed == "Any"]
    assert set(unknown) <= {
        name for name in OFFERED if "models" in latent_codec._EXPORTS[name]
    }  # diffusers' bases
