"""Decoding: whole frames or a named error, from folders and from files, in natural order."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import MediaKind, Video
from cosettle_cache.videos import frames
from cosettle_cache.videos.frames import FrameReader, frame_names, image_size, iter_frames, probe


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


def encode(
    path: Path, codec: str = "mpeg4", n_frames: int = 30, shift: int = 0, skip: int = 0, **options: str
) -> Path:
    """Write pictures, a key frame every 10; `shift` frames lie before zero, `skip` packets are lost."""
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        stream.options = options
        pictures = (av.VideoFrame.from_ndarray(picture(n), format="rgb24") for n in range(n_frames))
        packets = [packet for frame in [*pictures, None] for packet in stream.encode(frame)]
        for packet in packets[skip:]:
            early = round(shift / (10 * packet.time_base))
            packet.pts, packet.dts = packet.pts - early, packet.dts - early
            container.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "shift", "skip", "wanted"),
    [("edit_list.mp4", "mpeg4", 4, 0, 26), ("between_keys.mkv", "libx264", 0, 3, 23)],
)
def test_frames_are_those_that_the_decoder_gives(tmp_path, name, codec, shift, skip, wanted) -> None:
    path = encode(tmp_path / name, codec, shift=shift, skip=skip)
    video = video_of(path)
    assert video.n_frames == wanted < probe(path, exact=False).n_frames
    assert len(list(iter_frames(video, tmp_path))) == wanted


def test_hidden_frames_of_vp8_are_not_counted(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.webm", "libvpx")
    path = tmp_path / "clip.webm"
    with av.open(str(whole)) as source, av.open(str(path), "w") as container:
        (stream,) = source.streams.video
        copy = container.add_stream_from_template(stream)
        for number, packet in enumerate(item for item in source.demux(stream) if item.size):
            data = bytearray(bytes(packet))
            if number in (9, 19):
                data[0] &= ~0x10  # show_frame of the frame's header
            other = av.Packet(bytes(data))
            other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
            other.is_keyframe, other.stream = packet.is_keyframe, copy
            container.mux(other)
    video = video_of(path)
    assert (video.n_frames, probe(path, exact=False).n_frames) == (28, 30)
    assert len(list(iter_frames(video, tmp_path))) == 28


@pytest.mark.parametrize("suffix", [".tiff", ".TIF", ".avif", ".webp", ".bmp"])
def test_formats_of_frames(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(2):
        Image.fromarray(picture(number)).save(tmp_path / "clip" / f"{number}{suffix}")
    frames = list(iter_frames(video_of(tmp_path / "clip"), tmp_path))
    assert np.abs(frames[1].astype(int) - picture(1)).mean() < 8  # two of them are lossy


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_damage_that_a_decoder_conceals_is_an_error(tmp_path: Path, codec: str) -> None:
    # With mbtree x264 writes another file now and then, in which no decoder can tell some damage.
    path = encode(tmp_path / "clip.mp4", codec, mbtree="0")
    video, content = video_of(path), bytearray(path.read_bytes())
    at = content.index(b"mdat")
    at += int.from_bytes(content[at - 4 : at]) // 2
    content[at : at + 30] = bytes(byte ^ 255 for byte in content[at : at + 30])
    path.write_bytes(content)
    for read in (lambda: list(iter_frames(video, tmp_path)), lambda: probe(path)):
        with pytest.raises(MediaError, match=r"clip\.mp4 (is damaged|cannot be decoded)"):
            read()


def test_a_file_that_is_shorter_than_its_header_says_is_an_error(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(MediaError, match=r"is cut short") as caught:
        probe(path)
    assert caught.value.wanted == "3.0 s, as its header says"


def test_the_default_stream_is_read_and_no_preview(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10) for _ in range(2)]
        for stream, size, is_default in zip(streams, [(16, 32), (48, 64)], [0, 1], strict=True):
            stream.height, stream.width = size
            stream.pix_fmt, stream.disposition = "yuv420p", is_default
        for stream in streams:
            frame = av.VideoFrame.from_ndarray(picture(0, stream.height, stream.width), format="rgb24")
            container.mux([*stream.encode(frame), *stream.encode()])
    assert (probe(tmp_path / "clip.mkv").height, probe(tmp_path / "clip.mkv").n_frames) == (48, 1)


@pytest.mark.parametrize(
    ("a", "b", "c", "d", "shown"),
    [
        (-1, 0, 0, 1, lambda image: image[:, ::-1]),
        (1, 0, 0, -1, lambda image: image[::-1]),
        (-1, 0, 0, -1, lambda image: image[::-1, ::-1]),
        (0, 1, -1, 0, lambda image: np.rot90(image, 3)),
        (0, -1, 1, 0, lambda image: np.rot90(image, 1)),
        (0, 1, 1, 0, lambda image: image.transpose(1, 0, 2)),
    ],
)
def test_a_display_matrix_turns_and_mirrors(tmp_path: Path, a, b, c, d, shown) -> None:
    path = encode(tmp_path / "clip.mov", n_frames=1)
    plain = next(iter_frames(video_of(path), tmp_path))
    unit = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000]
    turned = [a * 0x10000, b * 0x10000, 0, c * 0x10000, d * 0x10000, *unit[5:]]
    content = path.read_bytes()
    track = content.index(b"tkhd")
    old, new = (struct.pack(">9i", *matrix) for matrix in (unit, turned))
    path.write_bytes(content[:track] + content[track:].replace(old, new, 1))
    assert np.array_equal(next(iter_frames(video_of(path), tmp_path)), shown(plain))


def test_sparse_frames_are_the_same_from_key_frames_on(tmp_path: Path, monkeypatch) -> None:
    path = encode(tmp_path / "clip.mp4", "libx264")
    video, starts = video_of(path), []
    every = list(iter_frames(video, tmp_path))
    decode = frames._decode
    monkeypatch.setattr(frames, "_FAR", 5)
    monkeypatch.setattr(frames, "_decode", lambda *given: starts.append(given[1:]) or decode(*given))
    sparse = list(iter_frames(video, tmp_path, [2, 14, 29]))
    assert all(np.array_equal(frame, every[index]) for frame, index in zip(sparse, [2, 14, 29], strict=True))
    assert len(starts) == 3
    # Where a packet gives no frame, numbers are not to be had from packets.
    path = encode(tmp_path / "edited.mp4", shift=4)
    every = list(iter_frames(video_of(path), tmp_path))
    assert np.array_equal(next(iter_frames(video_of(path), tmp_path, [20])), every[20])


def test_images_are_shown_as_exif_says(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for name in ("0.jpg", "1.png", "2.tif"):
        image = Image.fromarray(
            np.repeat(np.arange(48, dtype=np.uint8)[:, None, None] * 5, 64, 1).repeat(3, 2)
        )
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "clip" / name, exif=exif)
    assert {image_size(path) for path in (tmp_path / "clip").iterdir()} == {(64, 48)}
    for frame in iter_frames(video_of(tmp_path / "clip"), tmp_path):
        assert frame.shape == (64, 48, 3) and frame[0, 0, 0] > 230 > 10 > frame[0, -1, 0]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_of_grey_become_8(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "clip").mkdir()
    grey = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "clip" / f"0{suffix}")
    (frame,) = iter_frames(video_of(tmp_path / "clip"), tmp_path)
    assert np.array_equal(frame, np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, 2))


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P6 2 1 255 abcdef"]
)
def test_only_named_formats_are_opened(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(MediaError, match=r"0\.png cannot be decoded"):
        image_size(tmp_path / "0.png")
    (tmp_path / "clip.mp4").write_bytes(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n")
    with pytest.raises(MediaError, match=r"clip\.mp4 cannot be decoded"):
        probe(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", ["clip.mp4", "clip/0.png"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "clip").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(MediaError, match=r"is not a file|is no frame"):
        probe((tmp_path / name).parent if name.endswith("png") else tmp_path / name)


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


def claiming_gif(side: int) -> bytes:
    Image.new("P", (8, 8)).save(buffer := io.BytesIO(), "GIF")
    return buffer.getvalue()[:6] + struct.pack("<HH", side, side) + buffer.getvalue()[10:]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"not a video" * 50), "cannot be decoded"),
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds no frames"),
        # A few bytes that claim 16000 x 16000 pixels, and a film of a codec that nobody knows.
        (lambda p: p.write_bytes(claiming_gif(16000)), "cannot be decoded"),
        (
            lambda p: p.write_bytes(encode(p, "libx264").read_bytes().replace(b"avc1", b"zzzz")),
            "no video stream",
        ),
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


@pytest.mark.parametrize(
    "wanted",
    [
        ["a2.png", "b9.jpg", "b10.jpg", "b²", "b²1.PNG"],
        ["0.5.jpg", "1.10.jpg", "1.25.jpg", "1.5.jpg", "10.jpg"],
        ["v1.9.jpg", "v1.10.jpg"],
        ["01.png", "1.jpg", "002.png", "2.png"],
    ],
)
def test_order_of_names(tmp_path: Path, wanted: list[str]) -> None:
    for name in (*reversed(wanted), "._1.png", ".9.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert frame_names(tmp_path) == [name for name in wanted if "." in name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("3.jpg", "holds frame 3 twice"),
        ("3.PNG", "holds frame 3 twice"),
        ("a\nb.png", "which is no frame"),
        ("loop.png", "which is no frame"),
    ],
)
def test_files_that_are_no_frames_of_a_clip(folder: Path, name: str, said: str) -> None:
    if name == "loop.png":
        (folder / name).symlink_to(name)
    else:
        (folder / name).touch()
    with pytest.raises(MediaError, match=said):
        probe(folder)


def test_every_shared_clip_decodes_to_its_probed_length(shared_data: Callable[[str], Path]) -> None:
    for path in sorted(shared_data("clips/misc").iterdir())[::24]:
        video = video_of(path)
        assert sum(1 for _ in iter_frames(video, path.parent)) == video.n_frames


def test_images_are_read_where_there_is_no_decoder_of_films(tmp_path):
    Image.new("RGB", (32, 16)).save(tmp_path / "0.png")
    code = """
import sys
from pathlib import Path
sys.modules["av"] = None
from cosettle_cache import cli
from cosettle_cache.core.errors import MediaError
from cosettle_cache.videos.frames import probe
assert probe(Path(".")).n_frames == 1
try:
    probe(Path("a.mp4"))
except MediaError as error:
    assert "the package av is not installed" in error.summary, error.summary
else:
    raise AssertionError
"""
    (tmp_path / "a.mp4").write_bytes(b"film")
    folder = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": folder}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
