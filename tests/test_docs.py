"""The README and the pages of docs/: their code runs page by page, trainings cut to two steps; nothing is left out."""

import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from diffusers import AutoencoderKL
from helpers import ROOT
from helpers.pages import DOCS, MAKE_IMAGES, PAGES, run_page
from helpers.speech import write_tones
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.cli import VERBS
from latent_codec.conversion import from_diffusers
from latent_codec.conversion.checkpoints import save_checkpoint
from latent_codec.training.config import preset_names, preset_notes

README = PAGES["README"]
ALL = "\n".join(PAGES.values())
WITH_CODE = [name for name, page in PAGES.items() if name != "ideas" and re.search("```(bash|python)", page)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with `image.jpg`, `photos/`, `recordings/`, a foreign `vae.ckpt` and the examples, as the pages' reader has one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    ramp = np.linspace(0, 255, 80)
    for index in range(3):
        pixels = np.stack(
            [np.add.outer(ramp, ramp) / 2, np.full((80, 80), 80.0 * index), np.outer(ramp, ramp) / 255]
        )
        image = Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))
        image.save(tmp_path / "photos" / f"{index}.jpg")
    image.save(tmp_path / "image.jpg")
    for name, frequency in {"a": 300.0, "b": 900.0}.items():
        write_tones(tmp_path / f"recordings/{name}.wav", 0.5, frequencies=(frequency,))
    (tmp_path / "docs/images").mkdir(parents=True)
    with Image.open(DOCS / "images" / MAKE_IMAGES["PHOTOGRAPH"]) as photograph:
        photograph.crop((32, 160, 104, 232)).save(tmp_path / "docs/images" / MAKE_IMAGES["PHOTOGRAPH"])
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    autoencoder = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    save_checkpoint(from_diffusers(autoencoder, "ldm"), tmp_path / "vae.ckpt")
    return tmp_path


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_pages_code_runs(name, workplace):
    page = PAGES[name]
    if "--codec runs/mine" in page and "--out runs/mine" not in page:
        LatentCodec.from_pretrained("default").save_pretrained(workplace / "runs/mine")
    run_page(page, name)
    for image in MAKE_IMAGES["shown_images"](page):
        if (workplace / image).exists():
            assert min(Image.open(workplace / image).size) > 60


def test_the_readme_is_short_and_has_both_first_commands_an_image_and_links_that_lead_somewhere():
    assert len(README.splitlines()) <= 160
    assert README.index("pip install") == README.index("pip install -e . && latent-codec roundtrip\n")
    assert 'pip install -e ".[test]" && pytest\n' in README
    assert MAKE_IMAGES["shown_images"](README)
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_every_verb_and_preset_is_documented():
    table = re.findall(r"^\| (.+?) \| .+ \|$", PAGES["command-line"], re.MULTILINE)
    named = set(re.findall(r"`([\w-]+)", " ".join(table)))
    assert {verb.partition(" ")[0] for verb in VERBS} <= named
    for name in preset_names():
        assert f"| `{name}` | {preset_notes(name).summary} |\n" in PAGES["training"], name


def test_every_page_is_in_the_navigation_and_every_image_is_shown():
    navigation = (
        (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].partition("\ntheme:")[0]
    )
    pages = {path.name for path in DOCS.glob("*.md")}
    assert set(re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE)) == pages
    images = DOCS / "images"
    kept = {path.relative_to(images).as_posix(): path.stat().st_size for path in images.rglob("*.*")}
    shown = set(MAKE_IMAGES["shown_images"](ALL))
    assert shown | {MAKE_IMAGES["PHOTOGRAPH"]} == set(kept)
    assert sum(kept.values()) < 2.5e6


@pytest.mark.skipif(not find_spec("latex2mathml"), reason="needs the extra [docs]")
def test_the_site_has_every_verbs_help_cards_and_equations():
    import runpy

    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    page = hooks["on_page_markdown"]("{help}\n\n{card garments}\n\n{include CHANGELOG.md}\n\n```\n{x}\n```")
    for verb in VERBS:
        assert f"### {verb}\n" in page
    assert "usage: latent-codec fit-entropy" in page
    assert "\n## garments\n" in page and "license: mit" not in page and "(docs/" not in page
    html = hooks["on_page_content"](r'<p><span class="arithmatex">\(x \ge \frac{1}{n}\)</span></p>')
    assert "<math" in html and "<mfrac>" in html and "arithmatex" not in html
    equations = re.findall(r"\$\$(.*?)\$\$|(?<!\$)\$([^$\n]+)\$", PAGES["ideas"], re.DOTALL)
    assert len(equations) > 30
    for block, inline in equations:
        assert "\\" not in re.sub("<[^>]+>", "", hooks["mathml"](block or inline, bool(block))), (
            block or inline
        )
