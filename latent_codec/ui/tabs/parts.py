"""What several tabs are made of: where images are dropped, tables of figures, and how an answer is computed."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from latent_codec.images.tensors import enlarged_to
from latent_codec.ui.desk import Desk

logger = logging.getLogger(__name__)

WORK = "work"
"""Everything that computes is of this group, of which one runs at a time: further clicks wait in line."""


def drop(value: Path | None, label: str = "Image", height: int = 240, **options) -> gr.Image:
    """Where an image is dropped; functions get the path of its file, which Gradio neither decodes nor converts."""
    box = gr.Image(
        value and str(value),
        label=label,
        type="filepath",
        sources=["upload"],
        image_mode=None,
        height=height,
        buttons=[],
        elem_classes=["lc-drop"],
        **options,
    )
    box.preprocess = lambda payload: None if payload is None else payload.path
    return box


def examples(desk: Desk, into: gr.Image, labels: Sequence[str] = ("sandal", "coat", "bag")) -> gr.Examples:
    """The sample photograph, and garments."""
    paths = [desk.image, *map(desk.garment, labels)]
    return gr.Examples([[str(path)] for path in paths], into, label="or click on one of these")


def answer(
    triggers: Sequence[Callable],
    function: Callable,
    inputs: Sequence,
    outputs: Sequence,
    *,
    after: Any = None,
    **options,
) -> Any:
    """Let events call a function, and a click on one of the `examples` given as `after`, too; what goes wrong in it is one line on the page.

    Returns:
        The event, for `cancels`.
    """
    options = {"show_progress": "minimal", "trigger_mode": "always_last"} | options
    options |= {"concurrency_id": WORK, "concurrency_limit": 1, "api_visibility": "private"}
    event = gr.on(list(triggers), in_one_line(function), list(inputs), list(outputs), **options)
    if after is not None:
        after.load_input_event.success(in_one_line(function), list(inputs), list(outputs), **options)
    return event


def in_one_line(function: Callable) -> Callable:
    """The function, or generator, with its errors as Gradio shows them."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def each(*args):
            try:
                yield from function(*args)
            except Exception as error:
                raise _shown(error) from error

        return each

    @functools.wraps(function)
    def once(*args):
        try:
            return function(*args)
        except Exception as error:
            raise _shown(error) from error

    return once


def _shown(error: Exception) -> gr.Error:
    """One line, as text: it may hold the name of a file that somebody made up."""
    if isinstance(error, gr.Error):
        return error
    if not isinstance(error, (ValueError, OSError, MemoryError)):
        logger.exception("the page could not answer")
    text = " ".join(str(error).split()) or type(error).__name__
    return gr.Error(escape(text), title="That did not work", duration=20, print_exception=False)


def table(figures: Mapping[str, str], notes: Sequence[str] = ()) -> str:
    """Figures and notes as HTML."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in figures.items()
    )
    said = "".join(f'<p class="lc-note">{escape(note)}</p>' for note in notes)
    return f'<table class="lc-figures">{rows}</table>{said}'


def note(text: str) -> str:
    return f'<p class="lc-note">{escape(text)}</p>'


def shown(image, side: int = 256):
    """An image, enlarged by a whole factor if it is small."""
    return enlarged_to(image, side) if min(image.size) < side else image


def image_and_codec(desk: Desk, button_label: str, elem_id: str) -> tuple:
    """The column of a tab that sends one image through one codec: where it is dropped, the codec, the button and the examples."""
    with gr.Column(scale=1, min_width=260):
        dropped = drop(desk.image)
        codec = gr.Dropdown(list(desk.codecs), value=next(iter(desk.codecs)), label="Codec")
        button = gr.Button(button_label, variant="primary", elem_id=elem_id)
        clicked = examples(desk, dropped)
    return dropped, codec, button, clicked


def gallery(label: str, elem_id: str, height: int) -> gr.Gallery:
    """Where several images appear, without loss, four in a row."""
    return gr.Gallery(
        label=label, columns=4, format="png", height=height, object_fit="contain", elem_id=elem_id
    )


def image_box(label: str, height: int = 320, **options) -> gr.Image:
    """Where an image appears, without loss."""
    return gr.Image(
        label=label, format="png", interactive=False, height=height, buttons=["fullscreen"], **options
    )
