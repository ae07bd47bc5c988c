"""The tab Compare."""

from html import escape
from urllib.parse import quote

import gradio as gr

from latent_codec.ui.desk import Desk, read_dropped
from latent_codec.ui.equal_bytes import FORMATS, Compressed, compare
from latent_codec.ui.round_trip import why_no_lpips
from latent_codec.ui.tabs.parts import answer, drop, note

TIMES = 4
"""So much larger the crop is."""


def lay_out(desk: Desk) -> None:
    gr.Markdown(
        "The same image in **files of equal size**: what codecs make of them, and JPEG, WebP and AVIF. Point at any of the images: "
        f"below each, a crop shows that place {TIMES} times as large."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            dropped = drop(desk.image)
            codecs = gr.CheckboxGroup(desk.compressing, value=desk.compressing[:1], label="Codecs")
            formats = gr.CheckboxGroup(list(FORMATS), value=list(FORMATS), label="Formats")
            rate = gr.Slider(
                0.05, 1, 0.15, step=0.05, label="Bits per pixel", info="an uncompressed image has 24"
            )
            button = gr.Button("Compare", variant="primary", elem_id="compare-go")
        with gr.Column(scale=3):
            grid = gr.HTML(elem_id="compare-grid")

    def measure(path, names, others, bits_per_pixel, progress=gr.Progress()):  # noqa: B008  as Gradio asks for it
        image, notes = read_dropped(path)
        found = compare(
            {name: desk.codec(name) for name in names},
            others,
            image,
            bits_per_pixel,
            on_progress=lambda done, total: progress((done, total), desc="compressing"),
        )
        if found[1].trial.lpips is None:
            notes.append(f"no LPIPS: {why_no_lpips(image)}")
        return cells(desk, found) + "".join(map(note, notes))

    answer([button.click], measure, [dropped, codecs, formats, rate], [grid])


def cells(desk: Desk, found: list[Compressed]) -> str:
    """Images in a grid, each over its crop and its figures, as HTML."""
    return '<div class="lc-grid">' + "".join(_cell(desk, each) for each in found) + "</div>"


def _cell(desk: Desk, each: Compressed) -> str:
    url = f"gradio_api/file={quote(str(desk.keep(each.image, 'compared')))}"
    figures = f"{each.image.width}x{each.image.height} px"
    if each.trial is not None:
        figures = f"{each.trial.num_bytes:,} bytes, PSNR {each.trial.psnr:.2f} dB"
        figures += "" if each.trial.lpips is None else f", LPIPS {each.trial.lpips:.3f}"
        figures += f" ({each.note})" if each.note else ""
    size = f"{TIMES * each.image.width}px {TIMES * each.image.height}px"
    return (
        f'<figure><img src="{url}" alt="{escape(each.name)}"><div class="lc-crop" '
        f"style=\"background-image: url('{url}'); background-size: {size}\"></div>"
        f"<figcaption><b>{escape(each.name)}</b> {escape(figures)}</figcaption></figure>"
    )
