"""Pictures of a run: label maps or tracks over the frames, a slider per video, kinds of tokens side by side.

What `propagate` or `track` left in a folder comes in (overlay videos, or masks and the frames themselves), a
section with embedded pictures comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.types import Video
from cosettle_cache.heads.kinds import RAW
from cosettle_cache.pictures.drawing import draw_mask
from cosettle_cache.pictures.film import still_frames
from cosettle_cache.report.page import Media, data_element, data_uri, element, section, slider
from cosettle_cache.report.runs import ScoreRun
from cosettle_cache.videos.frames import Image8, iter_frames, natural_key, probe
from cosettle_cache.videos.masks import read_mask, sample_mask

#: Where `propagate` and `track` put their videos, and what they are called.
_FOLDERS, _SUFFIX = ("overlays", "pictures"), ".mp4"

#: Kinds of tokens shown side by side; more would make pictures too small and the file too large.
_MAX_KINDS = 4


def overlay_section(
    run: ScoreRun, number: int, media: Media, n_videos: int, max_frames: int
) -> tuple[Element | None, list[str]]:
    """Return the overlays of up to `n_videos` videos, `max_frames` of each, and which could not be read."""
    movies = [path for folder in _FOLDERS for path in (run.folder / folder).rglob(f"*{_SUFFIX}")]
    # What was scored, else whoever has overlays.
    names = sorted({path.stem for path in movies}, key=lambda name: (name != RAW, natural_key(name)))
    kinds = (run.tokens or names)[:_MAX_KINDS]
    drawn = {"/".join(path.relative_to(run.folder).parts[1:-1]) for path in movies}
    scored = (score.video_id for score in run.scores)
    videos = list(dict.fromkeys([*scored, *sorted(drawn, key=natural_key)]))
    known = [video_id for video_id in videos if _is_drawable(run, video_id, kinds, media)]
    figures, failed = list[Element](), list[str]()
    if not known or not n_videos or not kinds:
        return None, failed
    for video_id in known[:n_videos]:
        try:
            identifier = f"overlay-{number}-{len(figures)}"
            figures.append(_figure(run, kinds, video_id, media, max_frames, identifier))
        except CosettleError as error:
            failed.append(f"{video_id}: {error.summary}")
    about = f"{len(figures)} of {len(videos)} videos."
    if len(figures) < len(known):
        about += " More with --videos."
    if len(known) < len(videos):
        about += (
            " For the others, run propagate with --overlays all, or give report --features and --data-root."
        )
    if len(kinds) < len(run.tokens):
        about += f" The first {len(kinds)} of {len(run.tokens)} kinds of tokens."
    made = section(f"overlays-{number}", "Pictures: ", about, *figures, name=run.name, failures=failed)
    return made, failed


def _is_drawable(run: ScoreRun, video_id: str, kinds: Sequence[str], media: Media) -> bool:
    """Say whether there is an overlay video, or masks and frames, for all kinds."""
    if all(_movie(run, video_id, kind) for kind in kinds):
        return True
    video = media.videos.get(video_id)
    return video is not None and all(_masks(run, video, kind) for kind in kinds)


def _movie(run: ScoreRun, video_id: str, kind: str) -> Path | None:
    paths = (run.folder / folder / video_id / f"{kind}{_SUFFIX}" for folder in _FOLDERS)
    return next((path for path in paths if path.is_file()), None)


def _masks(run: ScoreRun, video: Video, kind: str) -> list[Path]:
    """Return the masks of a video in frame order; none unless every frame has one."""
    found = run.masks(kind, video.video_id)
    return found if len(found) == video.n_frames else []


def _figure(
    run: ScoreRun, kinds: Sequence[str], video_id: str, media: Media, max_frames: int, identifier: str
) -> Element:
    movies = [path for kind in kinds if (path := _movie(run, video_id, kind))]
    if len(movies) == len(kinds):
        frames = still_frames(min(probe(path).n_frames for path in movies), max_frames)
        found = [_from_movie(path, frames) for path in movies]
    else:
        video = media.videos[video_id]
        frames = still_frames(video.n_frames, max_frames)
        found = [_draw(video, media.root, _masks(run, video, kind), frames) for kind in kinds]
    names = [f"frame {frame}" for frame in frames]
    pictures = [list(map(data_uri, images)) for images in found]
    views = []
    for kind, uris in zip(kinds, pictures, strict=True):
        picture = element("img", src=uris[0], alt=f"{video_id}, {kind}, {names[0]}")
        views.append(element("figure", picture, element("figcaption", kind, class_="name")))
    return element(
        "figure",
        element("figcaption", video_id, class_="name"),
        element("div", *views, class_="views"),
        slider(f"Frame of {video_id}", names),
        data_element(f"data-{identifier}", {"pictures": pictures, "names": names}),
        class_="overlay",
        data_overlay=identifier,
    )


def _from_movie(path: Path, frames: Sequence[int]) -> Iterator[Image8]:
    info = probe(path)
    video = Video(path.stem, path.name, info.kind, info.n_frames, info.height, info.width)
    return iter_frames(video, path.parent, frames)


def _draw(video: Video, root: Path, masks: Sequence[Path], frames: Sequence[int]) -> Iterator[Image8]:
    for image, index in zip(iter_frames(video, root, frames), frames, strict=True):
        mask, size = read_mask(masks[index]), (video.height, video.width)
        yield draw_mask(image, mask if mask.shape == size else sample_mask(mask, size))
