"""What the site has beyond its pages: every verb's --help, model cards, equations as MathML.

A line `{help}` of a page becomes all verbs' help, `{card NAME}` the model card of latent_codec/assets/NAME, and `{include FILE}`
that file.
"""

import html
import io
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path

import latex2mathml.converter

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(
        r"^\{(help|card|include) ?(.*)\}$",
        lambda found: inserted(found[1], found[2]),
        markdown,
        flags=re.MULTILINE,
    )


def inserted(what: str, name: str) -> str:
    if what == "help":
        return helps()
    if what == "card":
        return card(name)
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def on_page_content(html_text: str, **_) -> str:
    """Equations, which arithmatex leaves as LaTeX, as MathML: browsers draw it without a script."""
    pattern = r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>'
    return re.sub(pattern, lambda found: mathml(found[3], found[2] == "["), html_text, flags=re.DOTALL)


def mathml(latex: str, is_block: bool) -> str:
    latex = html.unescape(latex).strip().replace(r"\arg", r"\operatorname{arg}")
    return latex2mathml.converter.convert(latex, display="block" if is_block else "inline")


def helps() -> str:
    """`latent-codec VERB --help` of every verb, a section each."""
    from latent_codec.cli import VERBS, main

    os.environ["COLUMNS"] = "80"  # of the help, whatever the terminal
    sections = []
    for verb in VERBS:
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            main([*verb.split(), "--help"])
        sections.append(f"### {verb}\n\n```text\n{text.getvalue()}```\n")
    return "\n".join(sections)


def card(name: str) -> str:
    """A model card without its front matter, a heading deeper."""
    text = (
        (ROOT / "latent_codec" / "assets" / name / "README.md")
        .read_text(encoding="utf-8")
        .split("\n---\n", 1)[1]
    )
    text = re.sub(r"^(#+) ", r"#\1 ", text.strip(), flags=re.MULTILINE)
    return re.sub(r"\[([^]]+)\]\((?!http)[^)]+\)", r"\1", text)  # links to its folder's files
