"""The tab Compress."""

import tempfile
import time
from pathlib import Path

import gradio as gr

from latent_codec.bitstream.container import SUFFIX
from latent_codec.ui.compressed import arriving, compress_to, open_file, space_of, stages
from latent_codec.ui.desk import Desk, check_bytes, read_dropped
from latent_codec.ui.tabs.parts import answer, drop, image_box, note, shown, table

PAUSE = 0.6
"""Seconds for which each stage is shown at least."""


def lay_out(desk: Desk) -> None:
    gr.Markdown(
        "Latents are few, so an image fits into a **small file** (.lcf), which every machine decodes to the same latents. Choose a rate, "
        "and compress; or drop a .lcf file to open it. A file arrives in **sections**: the first few bytes already show the image."
    )
    written = gr.State()  # the path of the file that is shown
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            dropped = drop(desk.image)
            codec = gr.Dropdown(desk.compressing, value=desk.compressing[0], label="Codec")
            rate = gr.Slider(0.05, 1, 0.2, step=0.05, label="Bits per pixel, at most")
            button = gr.Button("Compress", variant="primary", elem_id="compress-go")
            opened = gr.File(
                label="Open a .lcf file", file_types=[SUFFIX], height=130, elem_id="compress-open"
            )
        with gr.Column(scale=3):
            image = image_box("Decoded from the file", 460)
            stage = gr.HTML(elem_id="compress-stage")
            with gr.Row():
                figures = gr.HTML(elem_id="compress-figures")
                with gr.Column():
                    download = gr.DownloadButton(
                        "Download the file", interactive=False, elem_id="compress-download"
                    )
                    arrive = gr.Button("Watch it arrive", elem_id="compress-arrive")

    def keep(data: bytes, name: str) -> str:
        path = Path(tempfile.mkdtemp(dir=desk.folder)) / f"{name}{SUFFIX}"
        path.write_bytes(data)
        return str(path)

    def compress(path, name, bits_per_pixel):
        with_codec = desk.codec(name)
        pixels, notes = read_dropped(path, with_codec.channels)
        found = compress_to(with_codec, pixels, bits_per_pixel)
        kept = keep(found.data, Path(path).stem)
        return (
            shown(found.image),
            table(found.figures, notes),
            gr.DownloadButton(value=kept, interactive=True),
            kept,
            "",
        )

    def read(path):
        if path is None:
            return [gr.skip()] * 5
        check_bytes(path)
        data = Path(path).read_bytes()
        with_codec = desk.codec_of(space_of(data))
        found = open_file(with_codec, data)
        said = {"codec": with_codec.name} | found.figures
        return shown(found.image), table(said), gr.DownloadButton(value=path, interactive=True), str(path), ""

    def watch(path):
        if path is None:
            raise ValueError("compress an image first, or open a .lcf file")
        data = Path(path).read_bytes()
        count = len(stages(data))
        for number, (part, num_bytes) in enumerate(arriving(desk.codec_of(space_of(data)), data), 1):
            so_far = f"{num_bytes:,} of {len(data):,} bytes, stage {number} of {count}"
            yield shown(part), note(so_far + ("" if count > 1 else ": this file has one section"))
            if number < count:
                time.sleep(PAUSE)

    outputs = [image, figures, download, written, stage]
    answer([button.click, rate.release], compress, [dropped, codec, rate], outputs)
    answer([opened.upload], read, [opened], outputs)
    answer([arrive.click], watch, [written], [image, stage])
