"""The page around the sections: one HTML file with styles, scripts, charts and pictures inside.

Sections are trees of elements: all text and attributes are escaped when the tree becomes text. A content
security policy lets the page's own scripts and styles run, by their digests, and refuses any request.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree.ElementTree import Element, ParseError, fromstring, tostring

from PIL import Image

from cosettle_cache.core.console import human_bytes
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.files import first_bytes, own_file, read_file
from cosettle_cache.core.types import Video
from cosettle_cache.videos.frames import Image8

STYLES = ("page.css", "pictures.css")
#: In order: later ones use what earlier ones define.
SCRIPTS = ("theme.js", "tables.js", "slider.js", "affinity.js", "canvas.js", "explorer.js")

_SIZE_MARK = "@@size@@"
#: How a page begins, by which it is known for ours.
_POLICY = "default-src 'none'; img-src data:; style-src 'sha256-"
_BEGIN = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}'
)
#: Control characters are no text of HTML; names of files may have them.
_CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if code not in b"\t\n\r"}
#: Elements within elements of a chart; what the package draws has ten.
_DEEPEST = 100

#: Pixels of a picture's longer side.
_LONG_SIDE = 480
_QUALITY = 72

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
#: What an embedded chart may consist of. Styles are written as attributes: the policy allows no others.
_SHAPES = frozenset(f"{_SVG}{name}" for name in ("svg", "g", "defs", "path", "use", "text", "tspan"))
_LOOKS = re.compile(
    "[dxy]|viewBox|opacity|fill(-opacity)?|stroke(-(width|opacity|dasharray|dashoffset|linecap|linejoin))?"
    "|font-(size|weight)|text-anchor"
)
_TRANSFORM = re.compile(r"([a-z]+\([^()]*\)\s*)+")

Child = Element | str
Attribute = str | int | bool | None


@dataclass(frozen=True, slots=True)
class Media:
    """Videos by id and the folder that their paths are relative to; empty when nobody says where they are."""

    videos: Mapping[str, Video]
    root: Path


def element(name: str, /, *children: Child, **attributes: Attribute) -> Element:
    """Return an element; `aria_label` is written `aria-label`, `class_` is `class`.

    An attribute that is None or False is left out, True stands without a value.
    """
    made = Element(name)
    for key, value in attributes.items():
        if value is not None and value is not False:
            made.set(key.rstrip("_").replace("_", "-"), "" if value is True else str(value))
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def section(
    identifier: str,
    title: str,
    about: str | None,
    *children: Element,
    name: str | None = None,
    failures: Sequence[str] = (),
) -> Element:
    """Return a section under its title and the `name` of a run, if any; `failures` become warnings."""
    heading = element("h2", title, *([] if name is None else [element("span", name, class_="name")]))
    said = [] if about is None else [element("p", about, class_="about")]
    said += [element("p", text, class_="warning", role="note") for text in failures]
    return element("section", heading, *said, *children, id=identifier)


def scroll_box(child: Element, label: str) -> Element:
    """Return a box that scrolls sideways on narrow screens, by keyboard too."""
    return element("div", child, class_="scroll", tabindex="0", role="group", aria_label=label)


def data_element(identifier: str, document: Any) -> Element:
    """Return `document` as JSON that scripts of the page read by `identifier`.

    A script's content is not escaped, so no `<` may stand in it. Raises `ValueError` for NaN and infinity.
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", text, type="application/json", id=identifier)


def check_page(path: Path) -> None:
    """Raise `UsageError` for a URL, a folder, and a file that is no page of ours and stays as it is."""
    begin = _BEGIN.encode()
    own_file(path, "a report", lambda file: first_bytes(file, len(begin)) == begin)


def assemble(title: str, sections: Sequence[Element]) -> bytes:
    """Return the file; every section with an id and a heading gets a link at the top.

    Characters that are no text, as in names of files, become question marks or U+FFFD.
    """
    scripts = [_asset(name) for name in SCRIPTS]
    styles = "\n".join(map(_asset, STYLES))
    allowed = " ".join(map(_digest, scripts))
    policy = f"default-src 'none'; img-src data:; style-src {_digest(styles)}; script-src {allowed}"
    links = [
        element("a", "".join(heading.itertext()), href=f"#{item.get('id')}")
        for item in sections
        if (heading := item.find("h2")) is not None
    ]
    dark = {"type": "button", "id": "theme", "aria_pressed": "false", "aria_label": "Dark colours"}
    still = element("p", "Without scripts there are texts, charts and first pictures only.")
    size = f"This file: {_SIZE_MARK}; nothing in it is loaded from anywhere else."
    root = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            element("style", styles),
        ),
        element(
            "body",
            element(
                "header",
                element("h1", title),
                element("button", "Dark", **dark),
                element("nav", *links, aria_label="Sections"),
                class_="top",
            ),
            element(
                "main",
                element("noscript", still),
                *sections,
                element("footer", element("p", size, class_="about")),
            ),
            *(element("script", script) for script in scripts),
        ),
        lang="en",
    )
    text = "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
    text = text.translate(_CONTROLS)
    n_bytes = len(text.encode(errors="replace"))
    return text.replace(_SIZE_MARK, human_bytes(n_bytes)).encode(errors="replace")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return files("cosettle_cache.report").joinpath("assets", name).read_text(encoding="utf-8")


def chart(svg: Path, draw: Callable[[Path], None], identifier: str, label: str) -> Element:
    """Return the chart a run left as `svg`, or what `draw` writes to a path; `InputError` for no SVG."""
    with TemporaryDirectory() as folder:
        path = svg if svg.is_file() else Path(folder, "chart.svg")
        if path is not svg:
            draw(path)
        picture = _inline(path, f"{identifier}-")
    picture.set("role", "img")
    picture.set("aria-label", label)
    return element("figure", scroll_box(picture, label), class_="chart")


def _read_svg(path: Path) -> Element:
    try:
        root = fromstring(read_file(path))  # noqa: S314 - expat bounds what entities grow to
    except (ParseError, ValueError, LookupError) as error:  # the last two for encodings
        raise InputError(f"{path} is not a readable SVG", found=str(error)) from error
    if root.tag != f"{_SVG}svg":
        raise InputError(f"{path} is not an SVG", found=root.tag)
    depths = {root: 0}
    for node in root.iter():
        depths |= dict.fromkeys(node, depths[node] + 1)
    if max(depths.values()) > _DEEPEST:
        raise InputError(f"{path} is nested too deeply", wanted=f"{_DEEPEST} levels at most")
    return root


def _inline(path: Path, prefix: str) -> Element:
    """Return shapes and text of an SVG and nothing else; a prefix keeps its names apart from others."""
    root = _read_svg(path)
    nodes = list(root.iter())
    for node in nodes:
        for child in [item for item in node if item.tag not in _SHAPES]:
            node.remove(child)
        pairs = (item.partition(":") for item in node.get("style", "").split(";"))
        found = {**node.attrib, **{name.strip(): value.strip() for name, _, value in pairs}}
        kept = {key: value for key, value in found.items() if _LOOKS.fullmatch(key) and "(" not in value}
        if _TRANSFORM.fullmatch(found.get("transform", "")):
            kept["transform"] = found["transform"]
        if node.tag == f"{_SVG}path" and "id" in found:
            kept["id"] = prefix + found["id"]
        if found.get(_HREF, "").startswith("#"):
            kept["xlink:href"] = f"#{prefix}{found[_HREF][1:]}"
        node.tag = node.tag.removeprefix(_SVG)
        node.attrib.clear()
        node.attrib.update(kept)
        node.tail = None
    # Groups that say nothing are most of what matplotlib writes.
    for node in reversed(nodes):
        groups = [list(child) if child.tag == "g" and not child.attrib else [child] for child in node]
        node[:] = [child for group in groups for child in group]
        node.text = node.text if node.tag in ("text", "tspan") else None
    return root


def data_uri(image: Image8) -> str:
    """Return a frame, shrunk to `_LONG_SIDE`, as WebP in a data URI."""
    picture = Image.fromarray(image)
    picture.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="webp", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getbuffer()).decode()}"


def slider(label: str, names: Sequence[str]) -> Element:
    """Return a slider over `names`, at the first; without a choice it is disabled."""
    only_one = len(names) < 2
    place: dict[str, Attribute] = {"min": 0, "max": len(names) - 1, "step": 1, "value": 0}
    said = {"aria_label": label, "aria_valuetext": names[0]}
    return element(
        "div",
        element("button", "Play", type="button", class_="play", aria_pressed="false", disabled=only_one),
        element("input", type="range", **place, **said, disabled=only_one),
        element("output", names[0]),
        class_="slider",
    )
