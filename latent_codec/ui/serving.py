"""Serving the page: to loopback unless told, fetching nothing from anywhere."""

import os
from html import escape
from pathlib import Path

import gradio as gr
from gradio import processing_utils
from starlette.middleware import Middleware

from latent_codec.ui.desk import MAX_BYTES, Desk
from latent_codec.ui.page import build_page
from latent_codec.ui.ports import free_port

PORT = 7860
LOOPBACK = ("127.0.0.1", "localhost")
FOLDER = Path(__file__).parent
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' blob: data:; frame-ancestors 'self'; form-action 'self'"
)
"""The browser sends no request elsewhere, whatever the page holds."""


class OnlyHere:
    """Adds POLICY to every response."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message.setdefault("headers", []).append((b"content-security-policy", POLICY.encode()))
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def serve(
    desk: Desk, *, host: str = "127.0.0.1", port: int = PORT, opens_browser: bool = False
) -> tuple[gr.Blocks, str]:
    """Serve the page from threads of its own.

    Args:
        port: where this one is taken, the next free one is.

    Returns:
        The page, whose `close` ends it, and its URL.

    Raises:
        OSError: if no port is free, or `host` is no address of this machine.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(desk.folder / "dropped")
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    page = build_page(desk)
    _, url, _ = page.launch(
        server_name=host,
        server_port=free_port(host, port),
        inbrowser=opens_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        allowed_paths=[str(desk.folder)],
        max_file_size=MAX_BYTES,
        app_kwargs={"middleware": [Middleware(OnlyHere)]},
        theme=_theme(),
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    return page, url


async def _fetch_nothing(url: str, *args, **kwargs):
    """In place of Gradio's download of what a visitor names by a URL."""
    raise gr.Error(
        f"expected a file that was dropped on the page, got {escape(url):.100}", print_exception=False
    )


def _theme() -> gr.Theme:
    """Compact, in fonts that every system has: others would be fetched."""
    return gr.themes.Default(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        spacing_size="sm",
        radius_size="sm",
        text_size="sm",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
