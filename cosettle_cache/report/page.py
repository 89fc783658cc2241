"""The page around the sections: one file with styles, scripts and pictures inside, that fetches nothing.

Sections go in, the document's text comes out. A content security policy lets the page's own scripts and
styles run, by their digests, and nothing else; a browser that knows it refuses any request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from xml.etree.ElementTree import Element

from cosettle_cache.core.console import human_bytes
from cosettle_cache.report.elements import element, to_html

STYLES = ("page.css", "charts.css", "pictures.css")
#: In order: later ones use what earlier ones define.
SCRIPTS = ("theme.js", "tables.js", "curves.js", "slider.js", "affinity.js", "canvas.js", "explorer.js")

_SIZE_MARK = "@@size@@"


def assemble(title: str, sections: Sequence[Element]) -> str:
    """Return the document; every section with an id and a heading gets a link at the top."""
    head = element("header", element("h1", title), _theme_button(), _navigation(sections), class_="top")
    size = element(
        "p", f"This file: {_SIZE_MARK}; nothing in it is loaded from anywhere else.", class_="about"
    )
    still = element(
        "noscript", element("p", "Without scripts there are texts, charts and first pictures only.")
    )
    main = element("main", still, *sections, element("footer", size))
    scripts = [_asset(name) for name in SCRIPTS]
    styles = "\n".join(_asset(name) for name in STYLES)
    root = element(
        "html",
        element("head", *_meta(title, styles, scripts), element("style", styles)),
        element("body", head, main, *(element("script", script) for script in scripts)),
        lang="en",
    )
    return _with_size(to_html(root))


def _theme_button() -> Element:
    return element(
        "button", "Dark", type="button", id="theme", aria_pressed="false", aria_label="Dark colours"
    )


def _navigation(sections: Sequence[Element]) -> Element:
    links = [
        element("a", "".join(heading.itertext()), href=f"#{section.get('id')}")
        for section in sections
        if (heading := section.find("h2")) is not None
    ]
    return element("nav", *links, aria_label="Sections")


def _meta(title: str, styles: str, scripts: Sequence[str]) -> list[Element]:
    allowed = " ".join(_digest(script) for script in scripts)
    policy = f"default-src 'none'; img-src data:; style-src {_digest(styles)}; script-src {allowed}"
    return [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
    ]


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return files("cosettle_cache.report").joinpath("assets", name).read_text(encoding="utf-8")


def _with_size(text: str) -> str:
    """Say the size of the file in the file."""
    shown = human_bytes(len(encode(text)))
    return text.replace(_SIZE_MARK, shown)


def encode(text: str) -> bytes:
    """Return the bytes of the file; names that are no text are shown with question marks."""
    return text.encode("utf-8", errors="replace")
