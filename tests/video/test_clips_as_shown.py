"""Clips as players show them: turned, transparent, interlaced, HDR, uneven, and with sound."""

import os
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from clip_files import encode, sound_of, with_matrix  # noqa: E402

from tvkernels import _files  # noqa: E402
from tvkernels.video import VideoError, contact_sheet, read_mask, read_video, write_video  # noqa: E402
from tvkernels.video._decode import open_source  # noqa: E402

ONE, RED, RATE = 1 << 16, (255, 0, 0), 48000
TURNS = {
    "as it lies": ((ONE, 0, 0, ONE), lambda a: a),
    "mirrored": ((-ONE, 0, 0, ONE), lambda a: a[:, ::-1]),
    "upside down and mirrored": ((ONE, 0, 0, -ONE), lambda a: a[::-1]),
    "turned over": ((-ONE, 0, 0, -ONE), lambda a: a[::-1, ::-1]),
    "turned right": ((0, ONE, -ONE, 0), lambda a: np.rot90(a, -1)),
    "turned left": ((0, -ONE, ONE, 0), lambda a: np.rot90(a)),
    "transposed": ((0, ONE, ONE, 0), lambda a: a.transpose(1, 0, 2)),
    "transposed over": ((0, -ONE, -ONE, 0), lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
}


def quarters(frames=4, height=64, width=96):
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[:, : height // 2, : width // 2] = RED
    clip[:, : height // 2, width // 2 :] = 0, 255, 0
    clip[:, height // 2 :, : width // 2] = 0, 0, 255
    return clip


def ramp(frames=12):
    return (
        np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 20, 3, 3)
        .repeat(32, 1)
        .repeat(32, 2)
    )


def near(frames, expected, most=4):
    return np.median(np.abs(frames.astype(int) - expected)) <= most


@pytest.mark.parametrize("name", TURNS)
def test_every_display_matrix_is_shown_as_players_show_it(tmp_path, name):
    (a, b, c, d), turn = TURNS[name]
    path = write_video(tmp_path / "clip.mp4", quarters(1), 8)
    plain = read_video(path).frames[0].astype(int)
    shown = read_video(with_matrix(path, (a, b, 0, c, d, 0, 0, 0, 1 << 30))).frames[0]
    assert np.array_equal(shown, turn(plain))


def test_oblong_pixels_turn_with_the_frame(tmp_path):
    def widen(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = encode(tmp_path / "clip.mp4", quarters(), prepare=widen)
    with_matrix(path, (0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30))
    assert read_video(path, multiple=2).frames.shape[1:3] == (96 // 1, 64 // 2)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "png", "rgba"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mkv", "ffv1", "yuva420p"),
    ],
)
def test_transparent_clips_lie_on_white_and_outside_masks(tmp_path, name, codec, pix_fmt):
    clip = np.concatenate([quarters(2), np.full((2, 64, 96, 1), 255, np.uint8)], -1)
    clip[:, :32, :48, 3] = 0
    path = encode(tmp_path / name, clip, codec, pix_fmt, source="rgba")
    frames = read_video(path).frames
    assert near(frames[:, 4:28, 4:44], 255) and near(frames[:, 36:60, 4:44], (0, 0, 255))
    mask = read_mask(path, 2, (64, 96))
    assert not mask[:, 4:28, 4:44].any() and mask[:, 36:60, 4:44].all()


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("i.mp4", "libx264", {"x264-params": "tff=1"}),
        ("i.mkv", "mpeg2video", {"flags": "+ildct+ilme"}),
    ],
)
def test_fields_are_woven_into_one_moment(tmp_path, name, codec, options):
    clip = np.zeros((6, 64, 96, 3), np.uint8)
    for frame, x in enumerate(range(0, 96, 16)):
        clip[frame, 0::2, x : x + 8] = clip[frame, 1::2, x + 8 : x + 16] = 255
    frames = read_video(encode(tmp_path / name, clip, codec, options=options, setfield="tff"))
    grey = frames.frames.astype(int).mean(-1)
    assert len(frames) == 6
    assert np.abs(2 * grey[:, 1:-1] - grey[:, :-2] - grey[:, 2:]).mean() < 5


@pytest.mark.parametrize(
    ("height", "width", "written", "tags"),
    [
        (720, 64, "ITU709", {}),
        (64, 1280, "ITU709", {}),
        (64, 64, "ITU601", {}),
        (720, 64, "ITU601", {"colorspace": 5}),
        (64, 64, "ITU709", {"colorspace": 1}),
        (64, 64, "ITU709", {"colorspace": 1, "color_range": 2}),
    ],
)
def test_colours_as_tagged_else_by_size(tmp_path, height, width, written, tags):
    colour, full = (200, 30, 40), tags.get("color_range") == 2
    frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), colour, np.uint8)).reformat(
        format="yuv420p", dst_colorspace=written, dst_color_range="JPEG" if full else "MPEG"
    )

    def tag(thing):
        for name, value in tags.items():
            setattr(thing, name, value)

    frame.colorspace, frame.color_range = 2, 0
    tag(frame)
    path = encode(tmp_path / "c.mp4", [frame], prepare=lambda stream: tag(stream.codec_context))
    assert np.abs(read_video(path).frames[0, 8, 8].astype(int) - colour).max() <= 3


def wide(path, colours, curve, number):
    """Columns of linear BT.2020 colours in 10 bits."""
    r, g, b = (np.array([curve(c[i]) for c in colours]) for i in range(3))
    y = 0.2627 * r + 0.678 * g + 0.0593 * b
    planes = (64 + 876 * y, 512 + 896 * (b - y) / 1.8814, 512 + 896 * (r - y) / 1.4746)
    frame = av.VideoFrame(32 * len(colours), 32, "yuv444p10le")
    for plane, values in zip(frame.planes, planes, strict=True):
        row = np.zeros(plane.line_size // 2, "<u2")
        row[: 32 * len(colours)] = np.repeat(values.round(), 32)
        plane.update(np.tile(row, 32).tobytes())

    def tag(stream):
        context = stream.codec_context
        context.colorspace, context.color_primaries = 9, 9
        context.color_trc, context.color_range = number, 1

    return encode(path, [frame], pix_fmt="yuv444p10le", prepare=tag)


def hlg(x):
    x = 0.265 * x
    return (3 * x) ** 0.5 if x <= 1 / 12 else 0.17883277 * np.log(12 * x - 0.28466892) + 0.55991073


def pq(x):
    y = (203 * x / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


RED_2020, BLUE_2020 = (0.6274, 0.0691, 0.0164), (0.0433, 0.0114, 0.8956)


@pytest.mark.parametrize(
    ("curve", "number", "most"),
    [
        (hlg, 18, 30),
        pytest.param(pq, 16, 30, marks=pytest.mark.slow),
        (lambda x: 1.0993 * x**0.45 - 0.0993 if x > 0.018 else 4.5 * x, 14, 4),
    ],
)
def test_wide_colours_come_as_bt709(tmp_path, curve, number, most):
    path = wide(tmp_path / "w.mp4", [RED_2020, (1, 1, 1), (0, 0, 0)], curve, number)
    red, white, black = read_video(path).frames[0, 16, 16::32].astype(int)
    assert np.abs(red - RED).max() <= most
    assert white.min() >= 250 and black.max() <= 3


def test_a_wide_blue_stays_blue(tmp_path):
    path = wide(tmp_path / "w.mp4", [BLUE_2020], lambda x: max(0, 1.0993 * x**0.45 - 0.0993), 14)
    assert np.abs(read_video(path).frames[0, 16, 16].astype(int) - (0, 0, 255)).max() <= 12


def test_dolby_vision_alone_is_refused(tmp_path):
    # x265 gives a single frame no time to be decoded at, so mp4 refuses most such clips.
    options = {"x265-params": "log-level=0"}
    path = encode(tmp_path / "d.mp4", quarters(4), "libx265", options=options)
    path.write_bytes(path.read_bytes().replace(b"hev1", b"dvhe").replace(b"hvc1", b"dvh1"))
    with pytest.raises(VideoError, match="Dolby Vision .* export it as HDR10, HLG or SDR"):
        read_video(path)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("v.mp4", "libx264", "yuv420p"),
        ("v.mkv", "libx264", "yuv420p"),
        ("v.avi", "mjpeg", "yuvj420p"),
    ],
)
def test_uneven_times_become_a_constant_rate(tmp_path, caplog, name, codec, pix_fmt):
    times, tick = [0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14], Fraction(1, 10)
    path = encode(tmp_path / name, ramp(), codec, pix_fmt, 10, times=times, time_base=tick)
    video = read_video(path)
    assert "uneven frame times: read at 10 frames a second" in caplog.text and video.fps == 10
    shown = np.searchsorted(times, range(15), "right") - 1
    assert (np.round(video.frames[:, 16, 16, 0] / 20) == shown).all()
    part = read_video(path, start=4, stride=3, frames=3)
    assert np.array_equal(part.frames, video.frames[4:13:3])


def test_a_clip_without_a_list_of_times_is_counted(tmp_path):
    path, options = tmp_path / "f.mp4", {"movflags": "frag_keyframe+empty_moov"}
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in ramp():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    with open_source(path) as source:
        assert source.count == 12
    assert len(read_video(path)) == 12


def test_the_last_frame_after_a_pause_is_kept(tmp_path):
    pause = {"times": [0, 50], "time_base": Fraction(1, 10)}
    video = read_video(encode(tmp_path / "p.mkv", ramp(2), "libx264", "yuv420p", 10, **pause))
    assert np.round(video.frames[-1, 0, 0, 0] / 20) == 1


@pytest.mark.parametrize("fps", [10, 25, Fraction(24000, 1001), Fraction(30000, 1001), 60])
@pytest.mark.parametrize("name", ["k.mkv", "k.mov", "k.avi"])
def test_even_times_stay_what_they_are(tmp_path, caplog, name, fps):
    video = read_video(encode(tmp_path / name, ramp(), "mjpeg", "yuvj420p", fps))
    assert (len(video), video.fps, caplog.text) == (12, fps, "")


def test_a_gifs_delays_are_kept(tmp_path):
    first, *rest = (Image.fromarray(frame) for frame in ramp(4))
    first.save(
        tmp_path / "g.gif", save_all=True, append_images=rest, duration=[100, 100, 100, 400]
    )
    video = read_video(tmp_path / "g.gif")
    assert video.fps == 10 and video.frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 60, 60, 60]


@pytest.mark.parametrize("beside", ["libx264", "aac"])
def test_a_cover_picture_is_no_clip(tmp_path, beside):
    with av.open(str(tmp_path / "c.mp4"), "w") as out:
        cover, clip = out.add_stream("mjpeg", rate=8), out.add_stream(beside, rate=8000)
        cover.disposition = av.stream.Disposition.attached_pic
        cover.height, cover.width, cover.pix_fmt = 320, 320, "yuvj420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frames = [av.VideoFrame(320, 320, "yuvj420p"), silence]
        if beside == "libx264":
            clip.height, clip.width, clip.pix_fmt = 32, 32, "yuv420p"
            frames[1] = av.VideoFrame(32, 32, "yuv420p")
        else:
            clip.layout, silence.rate = "mono", 8000
        for stream, frame in zip((cover, clip), frames, strict=True):
            out.mux(stream.encode(frame))
        for stream in (cover, clip):
            out.mux(stream.encode(None))
    if beside == "libx264":
        assert read_video(tmp_path / "c.mp4").frames.shape == (1, 32, 32, 3)
    else:
        with pytest.raises(VideoError, match="holds no video stream"):
            read_video(tmp_path / "c.mp4")


@pytest.mark.parametrize(
    "name",
    [
        "take-12:30",
        "-x",
        "a%d",
        "a 'b\"\nc",
        "x?y#z",
        os.fsdecode(b"caf\xe9"),
        "cafe\u0301",
        "a" * 251,
    ],
)
def test_names_of_every_kind_are_written_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for ending in (".mp4", ".gif", ""):
        assert len(read_video(write_video(name + ending, quarters(2), 8))) == 2
    assert read_mask(f"{name}.mp4", 2, (64, 96)).any()
    contact_sheet([("a", quarters(1))], f"{name}.png")
    expected = {os.fsencode(name + e) for e in (".mp4", ".gif", "", ".png")}
    assert set(os.listdir(os.fsencode("."))) == expected


def test_a_locked_file_is_one_line(tmp_path, monkeypatch):
    def locked(*_):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(_files.os, "replace", locked)
    (tmp_path / "c.mp4").write_bytes(b"before")
    with pytest.raises(VideoError, match="Access is denied: close the program that has it open"):
        write_video(tmp_path / "c.mp4", quarters(1), 8)
    assert [file.name for file in tmp_path.iterdir()] == ["c.mp4"]


def test_a_picture_beyond_reason_is_one_line(tmp_path, monkeypatch):
    Image.fromarray(quarters(1)[0]).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(VideoError, match=r"a\.png is not an image that can be read: Image size"):
        read_video(tmp_path)


def test_folders_say_what_they_pass_over(tmp_path, caplog):
    for index, ending in enumerate((".PNG", ".tif", ".jfif", ".webp")):
        Image.new("RGB", (16, 16), (60 * index,) * 3).save(
            tmp_path / f"{index}{ending}", None if ending != ".jfif" else "JPEG"
        )
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (tmp_path / name).write_bytes(b"no picture")
    assert near(read_video(tmp_path).frames[:, 0, 0, 0], [0, 60, 120, 180]) and not caplog.text
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.png").mkdir()
    assert len(read_video(tmp_path)) == 4
    assert "passed over 5 that are no images: a.txt, b.txt, c.txt, ..." in caplog.text


def test_masks_of_the_whole_clip_follow_start_and_stride(tmp_path):
    masks = np.zeros((10, 16, 16, 3), np.uint8)
    for index in range(10):
        masks[index, index] = 255
    write_video(tmp_path / "m", masks, 8)
    mask = read_mask(tmp_path / "m", 3, (16, 16), start=2, stride=3)
    assert mask[:, :, 0].argmax(1).tolist() == [2, 5, 8]
    write_video(tmp_path / "taken", masks[:3], 8)
    assert read_mask(tmp_path / "taken", 3, (16, 16), start=2, stride=3)[2, 2].all()
    with pytest.raises(VideoError, match="3 masks, 4 frames .* or 12 and more for the whole clip"):
        read_mask(tmp_path / "taken", 4, (16, 16), start=2, stride=3)


def tone(seconds, rate=RATE):
    """300 Hz, and 200 more with every quarter of a second."""
    t = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (300 + 200 * np.floor(t * 4)) * t)).astype(np.float32)


def pitches(path, seconds):
    heard, rate = sound_of(path)
    found = []
    for at in np.arange(0.08, seconds, 0.25):
        piece = heard[int(at * rate) : int((at + 0.1) * rate)]
        strength = np.abs(np.fft.rfft(piece * np.hanning(len(piece)))) if len(piece) else [0]
        loud = len(piece) and np.abs(piece).max() > 0.02
        found.append(round(np.argmax(strength) * rate / len(piece), -2) if loud else 0)
    return found


@pytest.mark.parametrize(
    ("name", "codec", "picture", "kept"),
    [
        ("s.mp4", "aac", ("libx264", "yuv420p"), "aac"),
        ("s.mov", "pcm_s16le", ("libx264", "yuv420p"), "aac"),
        ("s.mkv", "libopus", ("libx264", "yuv420p"), "opus"),
        ("s.avi", "ac3", ("mjpeg", "yuvj420p"), "ac3"),
    ],
)
def test_sound_is_cut_to_the_frames_taken(tmp_path, name, codec, picture, kept):
    path = encode(tmp_path / name, quarters(12), *picture, sound=(codec, tone(1.5), RATE, 0))
    for options, expected in (
        ({}, [300, 500, 700, 900, 1100, 1300]),
        ({"start": 4, "frames": 4}, [700, 900, 0]),
        ({"start": 2, "stride": 2, "frames": 4}, [500, 700, 900, 1100, 0]),
    ):
        video = read_video(path, **options)
        out = write_video(tmp_path / "out.mp4", video.frames, video.fps, video.audio)
        with av.open(str(out)) as clip:
            assert clip.streams.audio[0].codec_context.name == kept
            assert abs(clip.duration / 1e6 - len(video) / video.fps) < 0.05
        assert pitches(out, len(expected) / 4) == expected


@pytest.mark.parametrize(("layout", "kept"), [("5.1", 6), ("quad", 4)])
def test_recoded_sound_keeps_its_channels(tmp_path, layout, kept):
    path = encode(tmp_path / "s.mp4", quarters(4))
    with av.open(str(tmp_path / "s.mov"), "w") as out, av.open(str(path)) as clip:
        picture = out.add_stream_from_template(clip.streams.video[0])
        heard = out.add_stream("pcm_s16le", rate=RATE, layout=layout)
        for packet in clip.demux(video=0):
            if packet.dts is not None:
                packet.stream = picture
                out.mux(packet)
        samples = np.tile(tone(0.5), (heard.channels, 1))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.rate, frame.pts = RATE, 0
        out.mux([*heard.encode(frame), *heard.encode(None)])
    video = read_video(tmp_path / "s.mov")
    write_video(tmp_path / "o.mp4", video.frames, video.fps, video.audio)
    with av.open(str(tmp_path / "o.mp4")) as result:
        assert result.streams.audio[0].channels == kept


def test_sound_that_begins_later_ends_earlier_or_is_not_there(tmp_path, caplog):
    path = encode(tmp_path / "s.mp4", quarters(12), sound=("aac", tone(0.5), RATE, 0.75))
    video = read_video(path)
    out = write_video(tmp_path / "out.mp4", video.frames, video.fps, video.audio)
    assert pitches(out, 1.5) == [0, 0, 0, 300, 500, 0]
    video = read_video(path, frames=4)
    out = write_video(tmp_path / "out.mp4", video.frames, video.fps, video.audio)
    assert "no sound beside the frames taken" in caplog.text
    assert not av.open(str(out)).streams.audio and read_video(out).audio is None
    assert read_video(write_video(tmp_path / "f", quarters(1), 8)).audio is None


def test_sound_that_cannot_be_kept_never_costs_the_clip(tmp_path, caplog):
    path = encode(tmp_path / "s.mp4", quarters(8), sound=("aac", tone(1), RATE, 0))
    audio = read_video(path).audio
    write_video(tmp_path / "out.gif", quarters(8), 8, audio)
    assert "holds no sound" in caplog.text
    path.unlink()
    assert len(read_video(write_video(tmp_path / "out.mp4", quarters(8), 8, audio))) == 8
    assert "is left out: No such file" in caplog.text
