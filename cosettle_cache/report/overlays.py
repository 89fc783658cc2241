"""Pictures of a run: label maps or tracks over the frames, a slider per video, kinds of tokens side by side.

What `propagate` or `track` left in a folder comes in (overlay videos, or masks and the frames themselves), a
section with embedded pictures comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.types import Video
from cosettle_cache.heads.kinds import RAW
from cosettle_cache.pictures.drawing import draw_mask
from cosettle_cache.report.page import Media, Shown, data_element, data_uri, element, slider, spread
from cosettle_cache.report.runs import ScoreRun
from cosettle_cache.videos.frames import Image8, iter_frames, natural_key, probe
from cosettle_cache.videos.masks import read_mask, sample_mask

#: Where `propagate` and `track` put their videos, and what they are called.
FOLDERS, SUFFIX = ("overlays", "pictures"), ".mp4"

#: Kinds of tokens shown side by side; more would make pictures too small and the file too large.
MAX_KINDS = 4


@dataclass(frozen=True, slots=True)
class Overlay:
    """Chosen frames of one video by kind of tokens, as data URIs."""

    video_id: str
    frames: tuple[int, ...]
    pictures: Mapping[str, tuple[str, ...]]


def overlay_section(run: ScoreRun, number: int, media: Media, n_videos: int, max_frames: int) -> Shown:
    """Return the overlays of up to `n_videos` videos, `max_frames` of each, and which could not be read."""
    kinds = _kinds(run)
    known = _drawable(run, kinds, media)
    if not known or not n_videos or not kinds:
        return Shown(None)
    shown, failed = _read(run, kinds, known[:n_videos], media, max_frames)
    figures = [_figure(overlay, kinds, f"overlay-{number}-{index}") for index, overlay in enumerate(shown)]
    section = element(
        "section",
        element("h2", "Pictures: ", element("span", run.name, class_="name")),
        element("p", _about(len(shown), len(known), _all_videos(run), len(kinds), run), class_="about"),
        *(element("p", text, class_="warning", role="note") for text in failed),
        *figures,
        id=f"overlays-{number}",
    )
    return Shown(section, tuple(failed))


def _kinds(run: ScoreRun) -> list[str]:
    """Return the kinds of tokens to show: what was scored, else whoever has overlays."""
    if run.tokens:
        return list(run.tokens[:MAX_KINDS])
    names = {path.stem for path in _movies(run)}
    return sorted(names, key=lambda name: (name != RAW, natural_key(name)))[:MAX_KINDS]


def _drawable(run: ScoreRun, kinds: Sequence[str], media: Media) -> list[str]:
    """Return the videos that have an overlay video, or masks and frames, for all kinds."""
    return [
        video_id
        for video_id in _all_videos(run)
        if all(_movie(run, video_id, kind) for kind in kinds)
        or (video_id in media.videos and all(_masks(run, media.videos[video_id], kind) for kind in kinds))
    ]


def _movies(run: ScoreRun) -> list[Path]:
    return [path for folder in FOLDERS for path in (run.folder / folder).rglob(f"*{SUFFIX}")]


def _all_videos(run: ScoreRun) -> list[str]:
    """Return the scored videos in their order, then others with overlays."""
    drawn = {"/".join(path.relative_to(run.folder).parts[1:-1]) for path in _movies(run)}
    return list(dict.fromkeys([*(score.video_id for score in run.scores), *sorted(drawn, key=natural_key)]))


def _movie(run: ScoreRun, video_id: str, kind: str) -> Path | None:
    paths = (run.folder / folder / video_id / f"{kind}{SUFFIX}" for folder in FOLDERS)
    return next((path for path in paths if path.is_file()), None)


def _masks(run: ScoreRun, video: Video, kind: str) -> list[Path]:
    """Return the masks of a video in frame order; none unless every frame has one."""
    found = sorted(
        (run.folder / kind / video.video_id).glob("*.png"), key=lambda path: natural_key(path.name)
    )
    return found if len(found) == video.n_frames else []


def _read(
    run: ScoreRun, kinds: Sequence[str], video_ids: Sequence[str], media: Media, max_frames: int
) -> tuple[list[Overlay], list[str]]:
    shown, failed = [], []
    for video_id in video_ids:
        try:
            shown.append(_overlay(run, kinds, video_id, media, max_frames))
        except CosettleError as error:
            failed.append(f"{video_id}: {error.summary}")
    return shown, failed


def _overlay(run: ScoreRun, kinds: Sequence[str], video_id: str, media: Media, max_frames: int) -> Overlay:
    movies = [path for kind in kinds if (path := _movie(run, video_id, kind))]
    if len(movies) == len(kinds):
        frames = spread(min(probe(path).n_frames for path in movies), max_frames)
        found = [_from_movie(path, frames) for path in movies]
    else:
        video = media.videos[video_id]
        frames = spread(video.n_frames, max_frames)
        found = [_draw(video, media.root, _masks(run, video, kind), frames) for kind in kinds]
    pictures = {kind: tuple(map(data_uri, images)) for kind, images in zip(kinds, found, strict=True)}
    return Overlay(video_id, tuple(frames), pictures)


def _from_movie(path: Path, frames: Sequence[int]) -> Iterator[Image8]:
    info = probe(path)
    video = Video(path.stem, path.name, info.kind, info.n_frames, info.height, info.width)
    return iter_frames(video, path.parent, frames)


def _draw(video: Video, root: Path, masks: Sequence[Path], frames: Sequence[int]) -> Iterator[Image8]:
    for image, index in zip(iter_frames(video, root, frames), frames, strict=True):
        mask, size = read_mask(masks[index]), (video.height, video.width)
        yield draw_mask(image, mask if mask.shape == size else sample_mask(mask, size))


def _about(n_shown: int, n_drawable: int, all_videos: Sequence[str], n_kinds: int, run: ScoreRun) -> str:
    said = f"{n_shown} of {len(all_videos)} videos."
    if n_shown < n_drawable:
        said += " More with --videos."
    if n_drawable < len(all_videos):
        said += (
            " For the others, run propagate with --overlays all, or give report --features and --data-root."
        )
    if n_kinds < len(run.tokens):
        said += f" The first {n_kinds} of {len(run.tokens)} kinds of tokens."
    return said


def _figure(overlay: Overlay, kinds: Sequence[str], identifier: str) -> Element:
    views = [_view(overlay, kind) for kind in kinds]
    names = [f"frame {frame}" for frame in overlay.frames]
    pictures = [overlay.pictures[kind] for kind in kinds]
    return element(
        "figure",
        element("figcaption", overlay.video_id, class_="name"),
        element("div", *views, class_="views"),
        slider(f"Frame of {overlay.video_id}", names),
        data_element(f"data-{identifier}", {"pictures": pictures, "names": names}),
        class_="overlay",
        data_overlay=identifier,
    )


def _view(overlay: Overlay, kind: str) -> Element:
    alt = f"{overlay.video_id}, {kind}, frame {overlay.frames[0]}"
    picture = element("img", src=overlay.pictures[kind][0], alt=alt)
    return element("figure", picture, element("figcaption", kind, class_="name"))
