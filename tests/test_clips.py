"""Clips in and out of files: no model, no JAX."""

from __future__ import annotations

import shutil
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw
from small_data import film

from contextdiff_jax.data.video import _step, read_clip, resize
from contextdiff_jax.editing.output import WRITERS, save_frames, save_gif, save_mp4, strip
from contextdiff_jax.editing.settings import FORMATS
from contextdiff_jax.evaluation import edit_scores as scores


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    save_frames(film(), folder / "frames")
    save_gif(film(), folder / "clip.gif", fps=8)
    save_mp4(film(), folder / "clip.mp4", fps=8)
    return folder


@pytest.mark.parametrize("name, decibel", [("frames", np.inf), ("clip.gif", 27), ("clip.mp4", 30)])
def test_a_clip_is_read_back_from_every_kind_of_file(files, name, decibel):
    clip = read_clip(files / name, num_frames=0)
    assert clip.shape == film().shape and scores.psnr(clip, film()) >= decibel


def test_start_stride_and_count_choose_the_frames(files):
    np.testing.assert_array_equal(
        read_clip(files / "frames", num_frames=2, start=1, stride=3), film()[[1, 4]]
    )
    np.testing.assert_array_equal(
        read_clip(files / "frames", num_frames=0, start=2, stride=2), film()[[2, 4]]
    )


def test_frames_are_scaled_to_cover_the_size_and_cut_about_the_middle():
    """A picture twice as wide as high, cut to a square: its outer quarters are gone, and a disc
    stays a disc.
    """
    frame = np.zeros((40, 80, 3), np.uint8)
    frame[:, :20], frame[:, 60:] = (255, 0, 0), (0, 0, 255)
    frame[14:26, 34:46] = 255
    small = resize(frame, (20, 20))
    assert small.shape == (20, 20, 3) and not small[:, 2:-2, 1:].min() and small[..., 0].max() > 200
    ys, xs = np.nonzero(small[..., 1] > 128)
    assert np.ptp(ys) == np.ptp(xs)
    assert resize(frame, (40, 80)) is frame


def test_what_is_transparent_lies_on_white(tmp_path):
    image = np.zeros((4, 6, 4), np.uint8)
    image[:, :3] = (200, 10, 10, 255)
    Image.fromarray(image).save(tmp_path / "0.png")
    clip = read_clip(tmp_path, num_frames=1)
    assert clip[0, 0, 0].tolist() == [200, 10, 10] and clip[0, 0, 5].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "names",
    [
        [f"{i}.png" for i in range(1, 13)],
        [f"frame{i}.PNG" for i in range(8, 12)],
        [f"frame_{i}.png" for i in range(9998, 10002)],
        ["00001.png", "00002.png", "00010.png", "100.png"],
        ["shot2_9.png", "shot2_10.png", "shot10_1.png"],
        ["a1.png", "A2.png", "a10.png"],
    ],
)
def test_frames_come_in_the_order_of_the_numbers_in_their_names(tmp_path, names):
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i * 10, 0, 0)).save(tmp_path / name)
    for name in ("._2.png", ".3.png", "Thumbs.db"):  # what macOS, editors and Windows leave
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "0.png").mkdir()
    clip = read_clip(tmp_path, num_frames=0)
    assert (clip[:, 0, 0, 0] // 10).tolist() == list(range(len(names)))


def test_frames_are_turned_and_made_eight_bits_as_in_training(tmp_path):
    exif, lying = Image.Exif(), film(1)[0]
    exif[0x0112] = 6
    Image.fromarray(lying).save(tmp_path / "0.png", exif=exif)
    upright = np.rot90(lying, -1)
    deep = upright[..., 0].astype(np.uint16) << 8
    Image.fromarray(deep).save(tmp_path / "1.png")
    clip = read_clip(tmp_path, num_frames=2)
    np.testing.assert_array_equal(clip[0], upright)
    np.testing.assert_array_equal(clip[1], np.repeat(upright[..., :1], 3, -1))


# -------------------- time stamps


def flat(*levels: int) -> np.ndarray:
    """Frames of one grey each."""
    return np.tile(np.uint8(levels)[:, None, None, None], (1, 16, 16, 3))


@pytest.mark.parametrize("fps", [8, 12, 30])
@pytest.mark.parametrize("levels", [[10, 10, 200, 200], [90] * 4, [10, 200, 200, 200], [7]])
def test_a_gif_of_ours_has_all_its_frames_also_equal_ones(tmp_path, levels, fps):
    save_gif(flat(*levels), tmp_path / "a.gif", fps)
    assert read_clip(tmp_path / "a.gif", num_frames=0)[:, 0, 0, 0].tolist() == levels
    with Image.open(tmp_path / "a.gif") as image:
        assert getattr(image, "n_frames", 1) == len(levels)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("milliseconds", "times"),
    [
        ([100, 200, 100], [1, 2, 1]),
        ([100, 150, 200], [2, 3, 4]),
        ([30, 30, 40], [1, 1, 1]),  # 30 a second by a clock of hundredths
        ([40, 400, 80], [1, 10, 2]),
        ([0, 0, 0], [1, 1, 1]),
    ],
)
def test_an_animations_frames_come_as_often_as_they_are_shown(tmp_path, kind, milliseconds, times):
    first, *rest = [Image.fromarray(frame) for frame in flat(10, 90, 200)]
    path, options = tmp_path / "a", {"lossless": True} if kind == "WEBP" else {}
    first.save(path, kind, save_all=True, append_images=rest, duration=milliseconds, **options)
    clip = read_clip(path, num_frames=0)  # by its content: the name has no suffix
    np.testing.assert_array_equal(clip, np.repeat(flat(10, 90, 200), times, axis=0))
    np.testing.assert_array_equal(read_clip(path, num_frames=2), clip[:2])


def test_every_format_has_a_writer():
    assert tuple(WRITERS) == FORMATS


@pytest.mark.parametrize("name, kind", [("webp", "WEBP"), ("apng", "PNG")])
@pytest.mark.parametrize("levels", [[10, 90, 200], [10, 10, 90, 90], [7, 7, 7], [7]])
def test_an_animation_has_each_frame_to_the_bit_and_its_time(tmp_path, name, kind, levels):
    clip, path = flat(*levels), tmp_path / f"a.{name}"
    clip[:, 3, 5] = (1, 2, 250)
    WRITERS[name](clip, path, 8)
    np.testing.assert_array_equal(read_clip(path, num_frames=0), clip)
    with Image.open(path) as image:
        assert image.format == kind and getattr(image, "n_frames", 1) == len(levels)
        if len(levels) > 1:
            image.load()
            assert image.info["loop"] == 0 and image.info["duration"] == 125


def test_a_png_opens_with_a_picture_that_is_no_frame_and_a_late_fault_hurts_nobody_before(tmp_path):
    first, *rest = [Image.fromarray(frame) for frame in flat(10, 90, 200)]
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, default_image=True)
    assert read_clip(tmp_path / "a.png", num_frames=0)[:, 0, 0, 0].tolist() == [90, 200]
    save_gif(film(), tmp_path / "a.gif", fps=8)
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[: len(content) * 3 // 4])
    assert read_clip(tmp_path / "a.gif", num_frames=3).shape == (3, 32, 48, 3)
    with pytest.raises(ValueError, match="video.path=.*a.gif: can't be read as a picture"):
        read_clip(tmp_path / "a.gif", num_frames=0)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("disposal", [0, 1, 2])
def test_frames_replace_each_other_as_the_animation_says(tmp_path, kind, disposal):
    """A square that moves over nothing: ffmpeg's decoder is the reference, for WebP the frames."""
    frames = [Image.new("RGBA", (32, 24)) for _ in range(3)]
    for i, frame in enumerate(frames):
        ImageDraw.Draw(frame).rectangle((8 * i, 4, 8 * i + 8, 14), fill=(220, 40, 40 * i, 255))
    options = {"lossless": True} if kind == "WEBP" else {"disposal": disposal}
    path = tmp_path / f"a.{kind.lower()}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=100, **options)
    if kind != "WEBP":
        with av.open(str(path)) as file:
            frames = [Image.fromarray(f.to_ndarray(format="rgba")) for f in file.decode(video=0)]
    white = Image.new("RGBA", (32, 24), "white")
    expected = [np.asarray(Image.alpha_composite(white, frame).convert("RGB")) for frame in frames]
    np.testing.assert_array_equal(read_clip(path, num_frames=0), np.stack(expected))


@pytest.mark.parametrize(
    ("durations", "tick", "expected"),
    [
        ([1 / 24] * 9, 1e-3, 1 / 24),
        ([0.033, 0.033, 0.034] * 9, 1e-3, 0.1 / 3),  # Matroska's clock of thousandths
        ([1 / 24] * 9 + [1 / 12] * 9, 1e-5, 1 / 24),
        ([1 / 25, 1 / 25, 1, 1 / 25], 1e-5, 1 / 25),
        ([0.033, 0.001, 0.032, 0.033, 0.034], 1e-3, 0.133 / 4),  # one stamp twice
        ([1 / 240] * 9, 1e-5, 1 / 240),
        (list(np.random.default_rng(0).uniform(0.02, 0.05, 60)), 1e-5, None),  # jitter: the mean
    ],
)
def test_a_clips_rate_is_the_slowest_that_fits_its_time_stamps(durations, tick, expected):
    assert _step(durations, tick) == pytest.approx(expected or np.mean(durations))


def write_film(path, frames, stamps=None, rate=8, cover=False, **fields):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        stream.codec_context.time_base = Fraction(1, rate)
        for name, value in fields.items():
            setattr(stream.codec_context, name, value)
        if cover:
            second = file.add_stream("mjpeg", rate=1)
            second.height = second.width = 64
            second.pix_fmt, second.disposition = "yuvj420p", av.stream.Disposition.attached_pic
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 9, np.uint8), format="rgb24")
            file.mux(second.encode(picture))
        for stamp, pixels in zip(stamps or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("stamps", "times"),
    [([0, 1, 2, 3], [1, 1, 1, 1]), ([5, 6, 10, 11], [1, 4, 1, 1]), ([0, 1, 3, 5], [1, 2, 2, 1])],
)
def test_a_films_frames_come_as_often_as_they_are_shown(tmp_path, suffix, stamps, times):
    path = write_film(tmp_path / f"a.{suffix}", flat(10, 70, 140, 210), stamps)
    clip = read_clip(path, num_frames=0)[:, 8, 8, 0].astype(int)
    assert np.abs(clip - np.repeat([10, 70, 140, 210], times)).max() < 4
    shutil.copy(path, tmp_path / "a.gif")  # the content counts
    assert len(read_clip(tmp_path / "a.gif", num_frames=0)) == len(clip)


def test_a_broadcasts_clock_that_starts_anew_is_no_pause(tmp_path):
    for suffix, frames in (("ts", 4), ("mp4", 99)):
        path = write_film(tmp_path / f"a.{suffix}", flat(10, 70, 140, 210), [0, 1, 97, 98])
        assert len(read_clip(path, num_frames=0)) == frames


@pytest.mark.parametrize(
    ("matrix", "method"),
    [
        ((1, 0, 0, 1), None),
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # a phone held upright
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
        ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
        ((0.7, 0.7, -0.7, 0.7), "45 degrees"),
    ],
)
def test_a_film_is_turned_and_mirrored_by_its_display_matrix(tmp_path, matrix, method):
    """The matrix of the track's header, ISO 14496-12 (tkhd), put there by hand."""
    path = write_film(tmp_path / "a.mp4", film(2))
    content = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (int(value * 65536) for value in matrix)
    at = content.index(plain, content.index(b"tkhd"))
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    if isinstance(method, str):
        with pytest.raises(ValueError, match=f"a.mp4: is turned by {method}; only multiples of 90"):
            read_clip(path, num_frames=2)
        return
    expected = [Image.fromarray(frame) for frame in film(2)]
    expected = [np.asarray(i if method is None else i.transpose(method)) for i in expected]
    assert scores.psnr(read_clip(path, num_frames=2), np.stack(expected)) > 30


@pytest.mark.parametrize(
    ("aspect", "size"), [("16/15", (48, 77)), ("8/9", (54, 72)), ("2", (48, 144))]
)
def test_a_film_of_oblong_pixels_is_stretched_to_square_ones(tmp_path, aspect, size):
    path = write_film(tmp_path / "a.mp4", film(2, 48, 72), sample_aspect_ratio=Fraction(aspect))
    clip = read_clip(path, num_frames=2)
    assert clip.shape[1:3] == size
    expected = Image.fromarray(film(2, 48, 72)[0]).resize(size[::-1], Image.Resampling.BICUBIC)
    assert scores.psnr(clip[:1], np.asarray(expected)[None]) > 30


def test_the_cover_of_a_film_is_not_the_film(tmp_path):
    path = write_film(tmp_path / "a.mp4", flat(10, 70, 140), cover=True)
    clip = read_clip(path, num_frames=0)
    assert clip.shape == (3, 16, 16, 3) and np.abs(clip[:, 8, 8, 0] - [10.0, 70, 140]).max() < 4


def broken_film(folder):
    path = folder / "noise.mp4"
    path.write_bytes(b"this is no film" * 50)
    return path


def different_sizes(folder):
    for i, side in enumerate((8, 9)):
        Image.new("RGB", (side, 8)).save(folder / f"{i}.png")
    return folder


def broken_picture(folder):
    (folder / "0.png").write_bytes(b"\x89PNG no")
    return folder


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: folder / "nowhere", "no such file or folder"),
        (lambda folder: folder, "has no frames"),
        (broken_film, "can't be decoded"),
        (different_sizes, "frame 1 is 8 x 9, the first 8 x 8"),
        (broken_picture, "can't be read as a picture"),
    ],
)
def test_a_clip_that_cannot_be_read_is_one_line(tmp_path, make, words):
    with pytest.raises(ValueError, match="video.path=.*" + words) as error:
        read_clip(make(tmp_path), num_frames=2)
    assert "\n" not in str(error.value)


def test_fewer_frames_than_asked_is_one_line(files):
    with pytest.raises(
        ValueError, match=r"has 6 frames; video.num_frames=4 from video.start=1 .* needs at least 8"
    ):
        read_clip(files / "frames", num_frames=4, start=1, stride=2)
    with pytest.raises(ValueError, match="has 6 frames"):
        read_clip(files / "clip.mp4", num_frames=7)
    with pytest.raises(ValueError, match="video.start=9"):
        read_clip(files / "frames", num_frames=0, start=9)


def test_a_film_of_odd_sides_is_made_even(tmp_path):
    save_mp4(film(3, 15, 17), tmp_path / "odd.mp4", fps=8)
    clip = read_clip(tmp_path / "odd.mp4", num_frames=3)
    assert clip.shape == (3, 16, 18, 3) and scores.psnr(clip[:, :15, :17], film(3, 15, 17)) > 30


def test_the_strip_has_every_clip_and_frame():
    clips = {"source": film(3), "an edit with a rather long label": 255 - film(3)}
    sheet = np.asarray(strip(clips))
    for row, clip in enumerate(clips.values()):
        for column, frame in enumerate(np.repeat(np.repeat(clip, 2, 1), 2, 2)):
            top, left = 4 + row * 68, 190 + column * 100
            np.testing.assert_array_equal(sheet[top : top + 64, left : left + 96], frame)
    with pytest.raises(ValueError, match="must be equal"):
        strip({"a": film(3), "b": film(2)})
