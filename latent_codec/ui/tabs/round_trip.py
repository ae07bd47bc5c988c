"""The tab Round trip."""

import gradio as gr

from latent_codec.ui.desk import Desk, read_dropped
from latent_codec.ui.round_trip import TIMES, round_trip
from latent_codec.ui.tabs.parts import answer, image_and_codec, image_box, shown, table


def lay_out(desk: Desk) -> None:
    gr.Markdown(
        "A **codec** squeezes an image into few numbers, its **latents**, and draws the image again from them. "
        "Pull the slider: on the left the original, on the right what came back."
    )
    with gr.Row():
        dropped, codec, button, clicked = image_and_codec(desk, "Send it through", "round-trip-go")
        with gr.Column(scale=3):
            slider = gr.ImageSlider(
                label="Original | reconstruction",
                format="png",
                interactive=False,
                elem_id="round-trip-slider",
            )
            with gr.Row():
                difference = image_box(f"Difference, {TIMES} times as large; mid-gray means equal", 260)
                figures = gr.HTML(elem_id="round-trip-figures")

    def send(path, name):
        opened = desk.codec(name)
        image, notes = read_dropped(path, opened.channels)
        found = round_trip(opened, image)
        pair = shown(found.original), shown(found.reconstruction)
        return pair, shown(found.difference), table(found.figures, notes + found.notes)

    outputs = [slider, difference, figures]
    answer([button.click, dropped.upload, codec.input], send, [dropped, codec], outputs, after=clicked)
