"""The tab Latents."""

import tempfile
from pathlib import Path

import gradio as gr

from latent_codec.analysis.attributes import AttributeDirection, fit_attribute
from latent_codec.components.codec_folders import SHIPPED_PIPELINES
from latent_codec.ui.completion import PARTS, Completion, hidden_cells
from latent_codec.ui.desk import Desk, check_bytes, read_dropped
from latent_codec.ui.garments import CLASSES, Garments
from latent_codec.ui.latents import RANGE, channels, morphed, strongest_dimensions, turned, vector
from latent_codec.ui.tabs.parts import answer, drop, gallery, image_and_codec, image_box, note

NUM_SLIDERS = 8
NO_ATTRIBUTE = "none"


def lay_out(desk: Desk) -> None:
    gr.Markdown(
        "**Latents** are the numbers that stand for an image. Look at them, walk through them from one image to another, turn them one by one, or "
        "let a model that has learned their order draw those that you hide."
    )
    with gr.Tabs():
        with gr.Tab("Channels"):
            _channels(desk)
        with gr.Tab("Morph"):
            _morph(desk)
        with gr.Tab("Turn"):
            _turn(desk)
        with gr.Tab("Complete") as tab:
            _complete(desk, tab)


def _channels(desk: Desk) -> None:
    gr.Markdown("Most codecs make a small grid of the image with a few channels; a denoiser works on these.")
    with gr.Row():
        dropped, codec, button, clicked = image_and_codec(desk, "Show its latents", "channels-go")
        with gr.Column(scale=3):
            images = gallery("Channels: black is -3, white is 3", "channels", 270)
            histograms = image_box("Histograms, and the standard normal that a denoiser starts from", 240)
            said = gr.HTML()

    def look(path, name):
        image, notes = read_dropped(path)
        found = channels(desk.codec(name), image)
        return found.images, found.histograms, note("; ".join([found.note, *notes]))

    inputs, outputs = [dropped, codec], [images, histograms, said]
    answer([button.click, dropped.upload, codec.input], look, inputs, outputs, after=clicked)


def _morph(desk: Desk) -> None:
    gr.Markdown(
        "What is between two images? The codec **garments** has one vector per image, and what is between two vectors is a garment; grids of "
        "latents cross-fade."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            with gr.Row():
                first = drop(desk.garment("sneaker"), "From", 150, min_width=100)
                second = drop(desk.garment("boot"), "To", 150, min_width=100)
            codec = gr.Dropdown(list(desk.codecs), value="garments", label="Codec")
            steps = gr.Slider(3, 16, 8, step=1, label="Images, both ends included")
            way = gr.Radio(["linear", "spherical"], value="linear", label="Way")
            button = gr.Button("Morph", variant="primary", elem_id="morph-go")
        with gr.Column(scale=3):
            with gr.Row():
                animation = gr.Image(
                    label="There and back", height=240, interactive=False, buttons=[], elem_id="morph"
                )
                strip = image_box("One by one", 240, scale=3)
            said = gr.HTML()

    def walk(start, end, name, count, how, progress=gr.Progress()):  # noqa: B008
        images = [read_dropped(each)[0] for each in (start, end)]
        path = Path(tempfile.mkdtemp(dir=desk.folder)) / "morph.webp"
        found = morphed(
            desk.codec(name),
            *images,
            path,
            steps=int(count),
            way=how,
            on_progress=lambda done, total: progress((done, total), desc="decoding"),
        )
        return str(found.animation), found.strip, note(found.note)

    answer([button.click], walk, [first, second, codec, steps, way], [animation, strip, said])


def _turn(desk: Desk) -> None:
    gr.Markdown(
        "Each slider is one number of the vector that stands for the image: turn it, and the codec draws what has that number. An **attribute** is a "
        "direction through all of them, found from garments of a class and garments of others, or dropped as `latent-codec attribute fit` writes it."
    )
    start, dimensions = gr.State(), gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            dropped = drop(desk.garment("dress"), height=150)
            codec = gr.Dropdown(desk.one_vector, value="garments", label="Codec with one vector per image")
            button = gr.Button("Take its vector", variant="primary", elem_id="turn-go")
            attribute = gr.Dropdown([NO_ATTRIBUTE, *CLASSES], value=NO_ATTRIBUTE, label="Attribute")
            amount = gr.Slider(-2, 2, 0, step=0.1, label="So far towards it", elem_id="turn-amount")
            direction = gr.File(
                label="A direction of your own (.safetensors)", file_types=[".safetensors"], height=130
            )
        with gr.Column(scale=2), gr.Row():
            sliders = [
                gr.Slider(
                    -RANGE,
                    RANGE,
                    0,
                    step=0.1,
                    label="-",
                    interactive=False,
                    min_width=200,
                    elem_id=f"turn-{place}",
                )
                for place in range(NUM_SLIDERS)
            ]
        with gr.Column(scale=1, min_width=260):
            image = image_box("Decoded", 300, elem_id="turn-image")

    def take(path, name):
        opened = desk.codec(name)
        pixels, _ = read_dropped(path)
        found, strongest = vector(opened, pixels), strongest_dimensions(opened, pixels, NUM_SLIDERS)
        updates = []
        for place in range(NUM_SLIDERS):
            if place >= len(strongest):
                updates.append(gr.Slider(visible=False))
                continue
            index = strongest[place]
            value = max(-RANGE, min(RANGE, round(found[index], 1)))
            updates.append(gr.Slider(value=value, label=f"dimension {index}", interactive=True, visible=True))
        return turned(opened, found, {}), found, strongest, gr.Slider(value=0), *updates

    def turn(name, found, strongest, label, own, how_far, *values):
        if found is None:
            raise ValueError("take the vector of an image first")
        opened = desk.codec(name)
        chosen = dict(zip(strongest, values))
        moved = {index: value for index, value in chosen.items() if abs(value - found[index]) > 0.051}
        along = None
        if own is not None:
            check_bytes(own)
            along = AttributeDirection.load(own, opened)
        elif label != NO_ATTRIBUTE:
            along = direction_of(desk, name, label)
        return turned(opened, found, moved, along, how_far)

    answer(
        [button.click, codec.input, dropped.upload],
        take,
        [dropped, codec],
        [image, start, dimensions, amount, *sliders],
    )
    events = [each.input for each in (*sliders, amount)] + [attribute.input, direction.upload]
    inputs = [codec, start, dimensions, attribute, direction, amount, *sliders]
    answer(events, turn, inputs, [image], show_progress="hidden")


def direction_of(desk: Desk, name: str, label: str) -> AttributeDirection:
    """From garments of other classes to those of one, in the latents of a codec; fitted when it is first asked for."""
    fit = lambda: fit_attribute(desk.codec(name), Garments(), f"class={CLASSES.index(label)}")  # noqa: E731
    return desk.once(("direction", name, label), fit)


def _complete(desk: Desk, tab: gr.Tab) -> None:
    gr.Markdown(
        "The pipeline **fashion-mnist** writes a garment as 7x7 indices, and its prior has learned which index follows which. Hide some, by the "
        "list or by a click on the image, and let the prior draw them again, as the garment that you name."
    )
    hidden = gr.State(set())
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            dropped = drop(desk.garment("boot"), height=150)
            part = gr.Dropdown(list(PARTS), value="top half", label="Hide")
            label = gr.Dropdown(list(CLASSES), value="boot", label="Draw it as")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            button = gr.Button("Complete", variant="primary", elem_id="complete-go")
        with gr.Column(scale=3):
            told = image_box("What the prior is told: click to hide or show", 260, elem_id="complete-told")
            drawn = gallery("What it draws", "completed", 260)

    def grid(path) -> Completion:
        image, _ = read_dropped(path)
        return Completion(desk.prior_pipeline(SHIPPED_PIPELINES[0]), image)

    def hide(path, chosen):
        found = grid(path)
        cells = hidden_cells(chosen, found.rows, found.columns)
        return found.shown(cells), cells

    def toggle(path, cells, event: gr.SelectData):
        found = grid(path)
        cells = cells ^ {found.cell_at(*event.index)}
        return found.shown(cells), cells

    def complete(path, cells, name, number, progress=gr.Progress()):  # noqa: B008
        found = grid(path)
        if not cells:
            raise ValueError("nothing is hidden: choose a part, or click on the image")
        images = found.drawn(
            cells,
            [name],
            seed=int(number),
            on_progress=lambda done, total: progress((done, total), desc="drawing"),
        )
        return images

    answer(
        [tab.select, part.input, dropped.upload],
        hide,
        [dropped, part],
        [told, hidden],
        show_progress="hidden",
    )
    answer([told.select], toggle, [dropped, hidden], [told, hidden], show_progress="hidden")
    answer([button.click], complete, [dropped, hidden, label, seed], [drawn])
