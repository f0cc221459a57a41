"""Clips in and out: formats, geometry, rates, and every kind of bad input."""

import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from tvkernels.video import (  # noqa: E402
    VideoError,
    check_output,
    contact_sheet,
    read_mask,
    read_video,
    write_video,
)

CLIPS = sorted((Path(__file__).parents[3] / "shared" / "data").glob("*.mp4"))


def quadrants(frames: int, height: int, width: int) -> np.ndarray:
    """Red, green / blue, white quarters, with a grey bar whose place tells the frame."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    y, x = height // 2, width // 2
    clip[:, :y, :x], clip[:, :y, x:] = (255, 0, 0), (0, 255, 0)
    clip[:, y:, :x], clip[:, y:, x:] = (0, 0, 255), (255, 255, 255)
    for index in range(frames):
        clip[index, :, index * 4 : index * 4 + 4] = 128
    return clip


def encode(path: Path, clip: np.ndarray, codec: str, pix_fmt: str, fps=8, prepare=None) -> Path:
    """Write a file that `write_video` cannot: another container, codec or header."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        if prepare:
            prepare(stream)
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("fps", [8, 25, Fraction(30000, 1001)])
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_mp4_keeps_frames_rate_and_colours(tmp_path, frames, fps):
    clip = quadrants(frames, 48, 80)
    video = read_video(write_video(tmp_path / "new" / "clip.mp4", clip, fps))
    assert video.frames.shape == clip.shape
    assert video.frames.dtype == np.uint8
    assert video.fps == fps
    # Chroma is stored at half size, so the edges between colours blur; areas must not shift.
    assert np.median(np.abs(video.frames.astype(int) - clip)) <= 2
    assert np.abs(video.frames[:, 4:20, 52:76].astype(int) - clip[:, 4:20, 52:76]).max() <= 8


@pytest.mark.parametrize("fps", [8, 10, 30])
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_gif_keeps_frames_rate_and_colours(tmp_path, frames, fps):
    clip = quadrants(frames, 40, 56)
    video = read_video(write_video(tmp_path / "clip.gif", clip, fps))
    # The file holds whole hundredths of a second.
    assert abs(frames / video.fps - frames / Fraction(fps)) <= Fraction(1, 100)
    assert fps == 30 or video.fps == fps
    assert np.abs(video.frames.astype(int) - clip).max() <= 4


def test_gif_keeps_frames_that_do_not_change(tmp_path):
    clip = np.repeat(quadrants(1, 32, 32), 4, axis=0)
    assert len(read_video(write_video(tmp_path / "still.gif", clip, 10))) == 4


def test_folder_round_trip_is_exact_and_in_natural_order(tmp_path):
    clip = quadrants(12, 16, 64)
    folder = write_video(tmp_path / "frames", clip, 8)
    assert np.array_equal(read_video(folder).frames, clip)
    for index, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"frame{index}.png")
    (folder / "notes.txt").write_text("not a picture", encoding="utf-8")
    assert np.array_equal(read_video(folder).frames, clip)


def test_16_bit_images_keep_their_greys(tmp_path):
    grey = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "0.png")
    frames, mask = read_video(tmp_path).frames, read_mask(tmp_path / "0.png", 1, (16, 16))
    assert np.array_equal(frames[0, ..., 0].ravel(), np.arange(256))
    assert 0.4 < mask.mean() < 0.6


@pytest.mark.parametrize("crop", (True, False))
def test_a_mask_of_the_sources_size_is_cut_as_the_clip_was(tmp_path, crop):
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[5:25, 20:50] = 255
    Image.fromarray(picture).save(tmp_path / "0.png")
    clip = read_video(tmp_path, size=(16, 16), crop=crop)
    mask = read_mask(tmp_path / "0.png", 1, (16, 16), clip.fit)
    assert np.array_equal(mask, clip.frames.max(-1) >= 128)
    Image.fromarray(picture[:, :32]).save(tmp_path / "other.png")
    with pytest.raises(VideoError, match="resized from 64 x 40: give it at their size"):
        read_mask(tmp_path / "other.png", 1, (16, 16), clip.fit)


def test_transparent_images_lie_on_white(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "0.png")
    assert (read_video(tmp_path).frames == 255).all()


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("clip.mov", "libx264", "yuv444p"),
        ("clip.webm", "libvpx-vp9", "yuv420p"),
        ("clip.mkv", "ffv1", "bgr0"),
    ],
)
def test_other_containers(tmp_path, name, codec, pix_fmt):
    clip = quadrants(5, 48, 64)
    video = read_video(encode(tmp_path / name, clip, codec, pix_fmt, fps=10))
    assert video.frames.shape == clip.shape
    assert abs(video.fps - 10) < 0.1
    error = np.abs(video.frames.astype(int) - clip)
    assert error.max() == 0 if codec == "ffv1" else np.median(error) <= 3


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_rotation_is_applied(tmp_path, quarter_turns):
    clip = quadrants(2, 48, 80)

    def turn(stream):
        stream.set_display_rotation(90 * quarter_turns)

    path = encode(tmp_path / "turned.mp4", clip, "libx264", "yuv420p", prepare=turn)
    expected = np.rot90(clip, quarter_turns, axes=(1, 2))
    video = read_video(path)
    assert video.frames.shape == expected.shape
    assert np.median(np.abs(video.frames.astype(int) - expected)) <= 2


def test_pixels_that_are_not_square_are_shown_square(tmp_path):
    def widen(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = encode(tmp_path / "wide.mp4", quadrants(1, 48, 64), "libx264", "yuv420p", prepare=widen)
    assert read_video(path).frames.shape == (1, 48, 128, 3)
    assert read_video(path, size=24).frames.shape == (1, 24, 64, 3)


@pytest.mark.parametrize(
    ("height", "width", "options", "expected"),
    [
        (48, 80, {}, (48, 80)),
        (45, 83, {}, (40, 80)),
        (45, 83, {"multiple": 1}, (45, 83)),
        (48, 80, {"size": 32}, (32, 48)),
        (80, 48, {"size": 32}, (48, 32)),
        (64, 64, {"size": 128, "multiple": 64}, (128, 128)),
        (100, 30, {"size": (24, 40)}, (24, 40)),
        (45, 83, {"size": (48, 16), "crop": False}, (48, 16)),
    ],
)
def test_sizes(tmp_path, height, width, options, expected):
    folder = write_video(tmp_path / "frames", quadrants(2, height, width), 8)
    frames = read_video(folder, **options).frames
    assert frames.shape == (2, *expected, 3)


def test_resizing_keeps_the_centre(tmp_path):
    clip = np.zeros((1, 40, 120, 3), np.uint8)
    clip[:, :, 40:80] = 255
    folder = write_video(tmp_path / "frames", clip, 8)
    assert (read_video(folder, size=(40, 40)).frames == 255).all()
    assert (read_video(folder, size=(16, 16)).frames > 200).all()
    squeezed = read_video(folder, size=(40, 40), crop=False).frames
    assert (squeezed[:, :, 0] == 0).all()
    assert (squeezed[:, :, 20] == 255).all()


def test_start_stride_and_frames(tmp_path):
    folder = write_video(tmp_path / "frames", quadrants(12, 16, 64), 8)
    whole = read_video(folder)
    part = read_video(folder, start=2, stride=3, frames=3)
    assert np.array_equal(part.frames, whole.frames[2:9:3])
    assert part.fps == whole.fps / 3
    assert len(read_video(folder, start=2, stride=3)) == 4


@pytest.mark.parametrize("clip", CLIPS, ids=lambda path: path.stem)
def test_real_clips(clip, tmp_path):
    video = read_video(clip, frames=8, size=128, multiple=64)
    assert video.frames.shape == (8, 128, 128, 3)
    assert video.frames.std() > 10
    again = read_video(write_video(tmp_path / "again.mp4", video.frames, video.fps))
    assert again.fps == video.fps
    error = (again.frames.astype(float) - video.frames) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 30


def test_odd_sides_become_even_in_mp4_and_stay_in_gif(tmp_path):
    clip = quadrants(2, 33, 45)
    mp4 = read_video(write_video(tmp_path / "odd.mp4", clip, 8), multiple=1)
    gif = read_video(write_video(tmp_path / "odd.gif", clip, 8), multiple=1)
    assert mp4.frames.shape == (2, 34, 46, 3)
    assert gif.frames.shape == clip.shape


def test_same_frames_give_the_same_bytes(tmp_path):
    clip = quadrants(4, 32, 48)
    for suffix in (".mp4", ".gif"):
        first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        assert (
            write_video(first, clip, 8).read_bytes() == write_video(second, clip, 8).read_bytes()
        )


def test_pil_images_are_frames_too(tmp_path):
    clip = quadrants(3, 16, 64)
    folder = write_video(tmp_path / "frames", [Image.fromarray(frame) for frame in clip], 8)
    assert np.array_equal(read_video(folder).frames, clip)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "twelve.mp4", quadrants(12, 48, 80), 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frames": 13}, "has 12 frames, which gives 12, not 13: ask for at most 12"),
        ({"frames": 9, "start": 2, "stride": 3}, "gives 4 from frame 2 at stride 3, not 9"),
        ({"start": 12}, "start must be under 12"),
        ({"start": -1}, "start must be at least 0"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"size": 100}, "size 100 cannot be reached.* 96 or 104"),
        ({"size": 4}, "size 4 cannot be reached"),
        ({"size": (64, 60)}, "size 60 cannot be reached"),
        ({"multiple": 64}, "smaller than 64 on a side: ask for a size"),
    ],
)
def test_impossible_requests_say_what_is_possible(twelve, options, says):
    with pytest.raises(VideoError, match=says) as caught:
        read_video(twelve, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.mp4", None, "does not exist"),
        ("empty.mp4", b"", "is empty"),
        ("text.mp4", b"these are words, not pictures\n" * 99, "not a video that can be read"),
        ("clip.txt", b"words", "not a clip that can be read: give .mp4"),
        ("cut.gif", b"GIF89a", "not a video that can be read"),
    ],
)
def test_unreadable_files(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError, match=says) as caught:
        read_video(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_clip_is_refused(tmp_path, twelve):
    path = tmp_path / "cut.mp4"
    path.write_bytes(twelve.read_bytes()[:300])
    with pytest.raises(VideoError, match="holds no video stream|not a video that can be read"):
        read_video(path)


def test_a_clip_that_ends_early_is_read_and_said(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 80, 3), np.uint8)
    path = write_video(tmp_path / "cut.mp4", noise, 8)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0 < len(read_video(path)) < 12
    assert "says it has 12 frames" in caplog.text


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="holds no video stream"):
        read_video(path)


def test_folder_without_images_or_with_a_broken_or_odd_one(tmp_path):
    with pytest.raises(VideoError, match="holds no frames"):
        read_video(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    Image.new("RGB", (16, 24)).save(tmp_path / "1.png")
    with pytest.raises(VideoError, match="frame 1 is 16 x 24 pixels"):
        read_video(tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"1\.png is not an image"):
        read_video(tmp_path)


@pytest.mark.parametrize(
    ("frames", "fps", "name", "says"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), 8, "a.mp4", "must be uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), 8, "a.mp4", r"not uint8 \[2, 3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), 8, "a.mp4", "at least one frame"),
        ([], 8, "a.mp4", "at least one frame"),
        (np.zeros((1, 8, 8, 3), np.uint8), 0, "a.mp4", "fps must be above 0"),
        (np.zeros((1, 8, 8, 3), np.uint8), float("nan"), "a.mp4", "fps must be above 0"),
        (np.zeros((1, 8, 8, 3), np.uint8), 60, "a.gif", "at most 50 frames a second"),
        (np.zeros((1, 8, 8, 3), np.uint8), 8, "a.avi", "must be one of .mp4, .gif, a folder"),
    ],
)
def test_what_cannot_be_written(tmp_path, frames, fps, name, says):
    with pytest.raises(VideoError, match=says):
        write_video(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_unwritable_output_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "file" / "deep" / "a.mp4"):
        with pytest.raises(VideoError, match="is a file, not a folder"):
            check_output(path, (".mp4",))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(VideoError, match="it is a folder"):
        check_output(tmp_path / "folder.mp4", (".mp4",))
    assert check_output(tmp_path / "new" / "a.mp4", (".mp4",)) == tmp_path / "new" / "a.mp4"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_a_failed_write_leaves_what_was_there(tmp_path, name):
    """A limit on the size of files stands in for a full disk."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    if Path(name).suffix:
        (tmp_path / name).write_bytes(b"before")
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(VideoError, match="cannot write"):
            write_video(tmp_path / name, noise, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before
    assert all(file.read_bytes() == b"before" for file in before)


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    from tvkernels.video import _encode

    def interrupted(path, frames, fps):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(_encode.ENCODERS, ".mp4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "clip.mp4", quadrants(1, 16, 16), 8)
    assert not list(tmp_path.iterdir())


def test_contact_sheet(tmp_path):
    path = contact_sheet(
        [
            ("source", quadrants(8, 48, 80)),
            ("EI2\n12.3 s", quadrants(3, 64, 32)),
            ("still", quadrants(1, 48, 48)),
        ],
        tmp_path / "sheet.png",
        height=48,
    )
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # Three rows of 48 pixels, two gaps of 3, margins of 12; the widest row has eight of 80.
    assert pixels.shape[0] == 3 * 48 + 2 * 3 + 2 * 12
    assert pixels.shape[1] > 8 * 80 + 7 * 3 + 2 * 12
    assert (pixels[:, :11] == 255).all()
    for row in range(3):
        label = pixels[12 + 51 * row : 60 + 51 * row, 12:30]
        assert label.min() < 120, f"row {row} has no label"
    with pytest.raises(VideoError, match="no frames"):
        contact_sheet([("none", quadrants(1, 8, 8)[:0])], tmp_path / "none.png")
    with pytest.raises(VideoError, match="at least one row"):
        contact_sheet([], tmp_path / "none.png")
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_without_the_extra_the_error_names_it():
    code = """
import sys
for name in ("av", "PIL", "PIL.Image"):
    sys.modules[name] = None
import tvkernels.video as video
try:
    video.read_video(sys.argv[1])
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, os.fspath(CLIPS[0]) if CLIPS else __file__],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    if CLIPS:
        assert "pip install 'tvkernels[video]'" in result.stdout, result.stderr
