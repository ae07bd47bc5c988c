"""The code of docs/ideas.md runs, with short trainings on few images; the page shows images of its own code."""

import re

import numpy as np
import pytest
from helpers.commands import write_idx
from helpers.pages import MAKE_IMAGES, PAGES, run_commands, run_page
from PIL import Image

PAGE = PAGES["ideas"]
SECTIONS = MAKE_IMAGES["sections"](PAGE)
del SECTIONS["Start"]
TRAININGS = {
    run: line for line, run in re.findall(r"^(latent-codec train .*--out (\S+).*)$", PAGE, re.MULTILINE)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `fashion_mnist/`, where a garment is a bright rectangle as wide and as high as its class says.

    What one section trains, others find.
    """
    folder = tmp_path_factory.mktemp("ideas")
    random = np.random.default_rng(0)
    (folder / "fashion_mnist").mkdir()
    for prefix, num_boots in (("train", 100), ("t10k", 0)):  # a detector holds out 20 of them
        classes = np.concatenate((np.arange(100) % 10, np.full(num_boots, 9))).astype(np.uint8)
        images = random.integers(0, 60, (len(classes), 28, 28), np.uint8)
        for image, each in zip(images, classes):
            image[4 : 10 + each, 4 : 24 - each] += 180
        write_idx(folder / "fashion_mnist" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / "fashion_mnist" / f"{prefix}-labels-idx1-ubyte", classes)
    return folder


@pytest.fixture
def workplace(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("title", SECTIONS)
def test_code(title, workplace):
    section = smaller(SECTIONS[title])
    for run, training in TRAININGS.items():
        if run in section and training not in SECTIONS[title] and not (workplace / run).exists():
            run_commands(smaller(training))
    run_page(section, "ideas")

    MAKE_IMAGES["keep_images"](section, workplace / "kept")
    for name in MAKE_IMAGES["shown_images"](section):
        with Image.open(workplace / "kept" / name) as image:
            assert min(image.size) > 60


def smaller(section: str) -> str:
    """With fewer generated images and fewer samples."""
    return re.sub(r"(?<=--num )\d+", "9", re.sub(r"(?<=shapes:)\d{3,}", "120", section))


def test_every_idea_has_an_equation_a_command_and_an_image():
    for title, section in SECTIONS.items():
        assert section.count("$$") >= 2 and "```bash" in section and "Look for:" in section, title
        assert MAKE_IMAGES["shown_images"](section), title


def test_a_page_is_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = 'open("a.txt", "w").write("1")'
    MAKE_IMAGES["run"](f"```python\n{code}\n```\n```bash\nlatent-codec train --list\n```")
    assert (tmp_path / "a.txt").read_text() == "1"
    assert "$ latent-codec train --list\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        MAKE_IMAGES["run"]("```bash\nlatent-codec info nothing-here\n```")
