"""The tab Watch."""

import gradio as gr

from latent_codec.ui.desk import TINY, Desk
from latent_codec.ui.tabs.parts import answer, image_box, note
from latent_codec.ui.watching import KINDS, watch


def lay_out(desk: Desk) -> None:
    gr.Markdown(
        "A denoiser draws in steps, on latents. A **preview** decodes what it is heading for after each step: *linear* takes a color from each "
        "latent, *tiny* is a small decoder, *full* the codec itself. The pipeline that is here has random weights and draws noise, to see "
        "the previews follow; start the page with `--pipeline FOLDER` for one of yours."
    )
    names = [*desk.pipelines, TINY]
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            pipeline = gr.Dropdown(names, value=names[0], label="Pipeline")
            prompt = gr.Textbox("a lighthouse at dusk", label="Prompt", max_length=1000)
            steps = gr.Slider(1, 100, 20, step=1, label="Steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            kind = gr.Radio(list(KINDS), value=KINDS[0], label="Preview")
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="watch-go", min_width=100)
                stop = gr.Button("Stop", elem_id="watch-stop", min_width=100)
        with gr.Column(scale=3):
            image = image_box("What it is drawing", 420, elem_id="watch-image")
            said = gr.HTML(elem_id="watch-said")

    def draw(name, words, count, number, how, progress=gr.Progress()):  # noqa: B008
        progress(0, desc="opening")
        folder = desk.pipeline_folder(name)
        for found in watch(
            folder, words, steps=int(count), seed=int(number), kind=how, device=str(desk.device)
        ):
            yield found.image, note(found.caption)

    drawing = answer([button.click], draw, [pipeline, prompt, steps, seed, kind], [image, said])
    stop.click(None, cancels=[drawing], api_visibility="private")
