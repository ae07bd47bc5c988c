"""The page: its five tabs."""

import gradio as gr

from latent_codec.ui.desk import Desk
from latent_codec.ui.tabs import compare, compress, latents, round_trip, watch

TABS = {
    "Round trip": round_trip,
    "Compare": compare,
    "Compress": compress,
    "Latents": latents,
    "Watch": watch,
}


def build_page(desk: Desk) -> gr.Blocks:
    with gr.Blocks(title="latent-codec", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("## latent-codec")
        with gr.Tabs():
            for title, tab in TABS.items():
                with gr.Tab(title):
                    tab.lay_out(desk)
    return page.queue(default_concurrency_limit=1, api_open=False, max_size=32)
