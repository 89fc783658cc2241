"""Decoding: whole frames or a named error, from folders and from files, in natural order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import MediaKind, Video
from cosettle_cache.videos.frames import FrameReader, frame_names, iter_frames, probe


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width]
    return np.stack([(rows * 4 + number * 9) % 256, (cols * 3) % 256, rows + cols], -1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "clip"
    path.mkdir()
    for number in range(12):
        Image.fromarray(picture(number)).save(path / f"{number}.png")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


def video_of(path: Path, **changes: object) -> Video:
    info = probe(path)
    values = {
        "n_frames": info.n_frames,
        "height": info.height,
        "width": info.width,
        "first_frame": 0,
    } | changes
    return Video(path.stem, path.name, info.kind, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["folder", "file"])
def test_frames_come_whole_and_in_natural_order(source: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(source)
    video = video_of(path)
    assert (video.n_frames, video.height, video.width) == (12, 48, 64)
    frames = list(iter_frames(video, path.parent))
    assert all(np.array_equal(frame, picture(i)) for i, frame in enumerate(frames))
    assert len(frames) == 12
    assert np.array_equal(next(iter_frames(video, path.parent, [10])), picture(10))
    part = video_of(path, first_frame=3, n_frames=5)
    assert [f[0, 0, 0] for f in iter_frames(part, path.parent, [0, 4])] == [27, 63]


def test_a_file_reports_its_rate(file: Path) -> None:
    assert probe(file).fps == 25
    assert probe(file).kind is MediaKind.FILE


def test_a_reader_goes_on_where_it_was_and_starts_again_when_asked_back(file: Path) -> None:
    reader = FrameReader(video_of(file), file.parent)
    for wanted in ([0, 3], [4, 5], [2], [11]):
        frames = list(reader.read(wanted))
        assert all(np.array_equal(f, picture(i)) for f, i in zip(frames, wanted, strict=True))


def damage_truncated(folder: Path) -> str:
    path = folder / "5.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "5.png"


def damage_text(folder: Path) -> str:
    (folder / "5.png").write_text("no image")
    return "5.png"


def damage_empty(folder: Path) -> str:
    (folder / "5.png").write_bytes(b"")
    return "is empty"


def damage_missing(folder: Path) -> str:
    (folder / "5.png").unlink()
    return "ends early"


def damage_size(folder: Path) -> str:
    Image.fromarray(picture(5, 32, 64)).save(folder / "5.png")
    return "another size"


@pytest.mark.parametrize("damage", [damage_truncated, damage_text, damage_empty, damage_missing, damage_size])
def test_a_bad_frame_is_named(folder: Path, damage: Callable[[Path], str]) -> None:
    video = video_of(folder)
    said = damage(folder)
    with pytest.raises(MediaError, match=said):
        list(iter_frames(video, folder.parent))


def test_a_truncated_jpeg_is_an_error_not_a_grey_area(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    path = tmp_path / "clip" / "0.jpg"
    Image.fromarray(picture(0, 256, 256)).save(path, quality=95)
    video = video_of(tmp_path / "clip")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"0\.jpg cannot be decoded"):
        next(iter_frames(video, tmp_path, [0]))


def test_mixed_sizes_are_found_when_probing(folder: Path) -> None:
    damage_size(folder)
    with pytest.raises(MediaError, match="mixes frame sizes") as caught:
        probe(folder)
    assert "5.png" in str(caught.value.found)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"not a video" * 50), "cannot be decoded"),
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds no frames"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    make(tmp_path / "clip.mp4")
    with pytest.raises(MediaError, match=said):
        probe(tmp_path / "clip.mp4")


def test_a_file_cut_short_is_an_error(file: Path) -> None:
    video = video_of(file, n_frames=14)
    with pytest.raises(MediaError, match="ends early") as caught:
        list(iter_frames(video, file.parent))
    assert caught.value.found == "12 frames"


def test_indices_outside_the_row_are_refused(folder: Path) -> None:
    with pytest.raises(MediaError, match="has no frame 12"):
        next(iter_frames(video_of(folder), folder.parent, [12]))


def test_natural_order(tmp_path: Path) -> None:
    for name in ("b10.jpg", "b9.jpg", "a2.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert frame_names(tmp_path) == ["a2.png", "b9.jpg", "b10.jpg"]


def test_every_shared_clip_decodes_to_its_probed_length(shared_data: Callable[[str], Path]) -> None:
    for path in sorted(shared_data("clips/misc").iterdir())[::12]:
        video = video_of(path)
        assert sum(1 for _ in iter_frames(video, path.parent)) == video.n_frames
