"""The page around the sections: one file with styles, scripts and pictures inside, that fetches nothing.

Sections go in, the document's text comes out. A content security policy lets the page's own scripts and
styles run, by their digests, and nothing else; a browser that knows it refuses any request.

HTML and SVG elements as trees: all text and attributes are escaped when the tree becomes text.

Names and children go in, elements of the standard library come out; nothing is ever pasted into markup.

Pictures inside the page: frames as data URIs, no larger than a page needs.

Frames as arrays go in, texts that an `img` takes as its source come out.

A slider over frames with a button that plays them; both work by keyboard as browsers have it.

The frames' names go in, an element comes out; `slider.js` moves what stands in the same figure.

Where the frames of a report's pictures are, and what came of showing them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

import numpy as np
from PIL import Image

from cosettle_cache.core.console import human_bytes
from cosettle_cache.core.types import Video
from cosettle_cache.videos.frames import Image8

Child = Element | str
Attribute = str | int | float | bool | None


def element(name: str, /, *children: Child, **attributes: Attribute) -> Element:
    """Return an element; `aria_label` is written `aria-label`, `class_` is `class`.

    An attribute that is None or False is left out, True stands without a value.
    """
    made = Element(
        name, {_written(key): _value(value) for key, value in attributes.items() if _is_set(value)}
    )
    append(made, children)
    return made


def append(parent: Element, children: Iterable[Child]) -> None:
    """Add elements and text at the end of `parent`."""
    for child in children:
        if isinstance(child, Element):
            parent.append(child)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + child
        else:
            parent.text = (parent.text or "") + child


def data_element(identifier: str, document: Any) -> Element:
    """Return `document` as JSON that scripts of the page read by `identifier`.

    The content of a script element is not escaped, so no `<` may stand in it. Raises `ValueError` for numbers
    that JSON does not have.
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", text, type="application/json", id=identifier)


def finite(values: Iterable[float]) -> list[float | None]:
    """Return values with None for those that JSON does not have."""
    return [value if math.isfinite(value) else None for value in values]


def to_html(root: Element) -> str:
    """Return the document of `root`."""
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def _is_set(value: Attribute) -> bool:
    return value is not None and value is not False


def _written(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: Attribute) -> str:
    if value is True:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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


#: Pixels of a picture's longer side.
LONG_SIDE = 480
QUALITY = 72


def data_uri(image: Image8) -> str:
    """Return a frame, shrunk to `LONG_SIDE`, as WebP in a data URI."""
    picture = Image.fromarray(image)
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="webp", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getbuffer()).decode()}"


def spread(n_frames: int, at_most: int) -> list[int]:
    """Return up to `at_most` frames of `n_frames`, the first and the last among them, evenly spread."""
    chosen: Sequence[float] = np.linspace(0, n_frames - 1, min(n_frames, at_most)).tolist()
    return sorted({round(place) for place in chosen})


def slider(label: str, names: Sequence[str], value: int = 0) -> Element:
    """Return a slider over `names`, at number `value`; without a choice it is disabled."""
    only_one = len(names) < 2
    return element(
        "div",
        element("button", "Play", type="button", class_="play", aria_pressed="false", disabled=only_one),
        element(
            "input",
            type="range",
            min=0,
            max=max(len(names) - 1, 0),
            step=1,
            value=value,
            aria_label=label,
            aria_valuetext=names[value],
            disabled=only_one,
        ),
        element("output", names[value]),
        class_="slider",
    )


@dataclass(frozen=True, slots=True)
class Media:
    """Videos by id and the folder that their paths are relative to; empty when nobody says where they are."""

    videos: Mapping[str, Video]
    root: Path


@dataclass(frozen=True, slots=True)
class Shown:
    """A section, if there is something to show, and the videos that could not be shown, with reasons."""

    section: Element | None
    failures: tuple[str, ...] = ()
