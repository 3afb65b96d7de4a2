import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from deepgen_jax.data import images
from deepgen_jax.errors import UserError
from tests.data.broken_files import bomb


@pytest.mark.parametrize(
  "size, expected",  # (width, height), from the reference
  [
    ((1024, 1024), (512, 512)),
    ((1920, 1080), (704, 384)),
    ((1024, 768), (608, 448)),
    ((1536, 1024), (640, 448)),
    ((832, 1216), (448, 640)),
    ((2048, 512), (1024, 256)),
    ((500, 333), (640, 448)),
  ],
)
def test_fix_pixels_table(size, expected):
  assert images.fixed_size(size[1], size[0], 512) == expected[::-1]


def test_squares_stay_square():
  assert {images.fixed_size(side, side, 512) for side in range(32, 4097)} == {(512, 512)}
  assert {images.fixed_size(side, side, 64) for side in range(16, 1025)} == {(64, 64)}


def test_fix_pixels_is_pil_bicubic():
  image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
  fixed = images.fix_pixels(image, 64)
  assert fixed.shape == (64, 96, 3)
  np.testing.assert_array_equal(fixed, Image.fromarray(image).resize((96, 64), Image.BICUBIC))


def test_load_applies_orientation_and_puts_alpha_on_white(tmp_path):
  picture = Image.new("RGB", (4, 2), "red")
  exif = picture.getexif()
  exif[0x0112] = 6  # a quarter turn
  picture.save(tmp_path / "turned.png", exif=exif)
  assert images.load_image(tmp_path / "turned.png").shape == (4, 2, 3)
  clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
  assert (images.load_image(clear) == 255).all()
  palette = Image.new("P", (2, 2), 0)
  palette.putpalette([0, 0, 255])
  palette.info["transparency"] = 0
  assert (images.load_image(palette) == 255).all()
  assert images.load_image(np.zeros((2, 3), np.uint8)).shape == (2, 3, 3)
  assert images.load_image(np.zeros((2, 3, 1), np.uint8)).shape == (2, 3, 3)


def test_what_cannot_be_read_is_named(tmp_path):
  (tmp_path / "broken.png").write_bytes(b"not an image")
  with pytest.raises(UserError, match=r"broken\.png"):
    images.load_image(tmp_path / "broken.png")
  with pytest.raises(UserError, match=r"missing\.png does not exist"):
    images.load_image(tmp_path / "missing.png")
  with pytest.raises(UserError, match="float64"):
    images.load_image(np.zeros((2, 2, 3)))


def test_reference_sizes_are_never_resized():
  assert images.reference_sizes([np.zeros((64, 96, 3), np.uint8)]) == [(64, 96)]
  with pytest.raises(ValueError, match="multiples of 32"):
    images.reference_sizes([np.zeros((64, 65, 3), np.uint8)])


def encode(image, **options):
  data = io.BytesIO()
  image.save(data, **options)
  return data.getvalue()


def png_of_16_bits(pixels, colour):
  """A PNG by hand, since PIL writes no 16-bit colour: pixels uint16 [H,W,C]; colour 0 grey, 2 RGB, 4 grey with alpha."""
  chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  height, width = pixels.shape[:2]
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bits_are_scaled():
  grey = np.array([[[0], [257], [25700], [65535]]], np.uint16)
  np.testing.assert_array_equal(images.decode_image(png_of_16_bits(grey, 0), "it")[0, :, 0], [0, 1, 100, 255])
  rgb = np.array([[[0, 25700, 65535]]], np.uint16)
  np.testing.assert_array_equal(images.decode_image(png_of_16_bits(rgb, 2), "it")[0, 0], [0, 100, 255])
  alpha = np.array([[[25700, 65535], [25700, 0]]], np.uint16)
  np.testing.assert_array_equal(images.decode_image(png_of_16_bits(alpha, 4), "it")[0, :, 0], [100, 255])


def test_transparency_of_palettes_and_grey_is_put_on_white():
  palette = Image.new("P", (2, 1))
  palette.putpalette([0, 0, 255, 255, 0, 0])
  palette.putpixel((1, 0), 1)
  read = images.decode_image(encode(palette, format="PNG", transparency=0), "it")
  np.testing.assert_array_equal(read[0], [[255, 255, 255], [255, 0, 0]])
  grey = Image.new("LA", (2, 1), (100, 255))
  grey.putpixel((1, 0), (100, 0))
  np.testing.assert_array_equal(images.decode_image(encode(grey, format="PNG"), "it")[0], [[100] * 3, [255] * 3])


def test_cmyk_becomes_rgb():
  cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
  np.testing.assert_allclose(images.decode_image(encode(cyan, format="JPEG"), "it")[8, 8], [0, 255, 255], atol=3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
  frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
  options = {"lossless": True} if kind == "WEBP" else {}
  data = encode(frames[0], format=kind, save_all=True, append_images=frames[1:], duration=50, **options)
  with Image.open(io.BytesIO(data)) as written:
    assert written.n_frames == 2
  np.testing.assert_array_equal(images.decode_image(data, "it"), np.broadcast_to([255, 0, 0], (8, 8, 3)))


def test_orientation_of_a_jpeg():
  picture = Image.new("RGB", (32, 16), "white")
  picture.paste("black", (0, 0, 16, 16))
  exif = picture.getexif()
  exif[0x0112] = 6
  read = images.decode_image(encode(picture, format="JPEG", exif=exif), "it")
  assert read.shape == (32, 16, 3) and read[4, 8].max() < 30 and read[28, 8].min() > 225  # the left is now on top


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_files_are_errors(kind):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  data = encode(noise, format=kind)
  with pytest.raises(UserError, match="cannot read image some file"):
    images.decode_image(data[: len(data) // 2], "some file")


def test_floating_point_pixels_are_refused():
  with pytest.raises(UserError, match="floating-point"):
    images.decode_image(encode(Image.new("F", (2, 2), 0.5), format="TIFF"), "it")


@pytest.mark.parametrize("size, count", [(512, 89), (1024, 181)])
def test_the_number_of_sizes_is_bounded(size, count):
  ratios = np.exp(np.linspace(0, np.log(10), 4001))
  wide = {images.fixed_size(1, ratio, size) for ratio in ratios}
  assert len(wide | {(width, height) for height, width in wide}) == count


def blank(height, width):
  return np.zeros((height, width, 3), np.uint8)


def test_an_edit_and_its_source_have_one_size():
  assert images.fixed_size(1023, 1024, 512) == (512, 544)  # sized one by one, a pixel would make a difference
  for target, source in [((512, 512), (1023, 1024)), ((1023, 1024), (512, 512))]:
    fixed, (reference,) = images.fix_edit(blank(*target), [blank(*source)], 512)
    assert fixed.shape == reference.shape == (*images.fixed_size(*target, 512), 3)


def test_other_references_keep_their_own_size():
  fixed, references = images.fix_edit(blank(64, 64), [blank(64, 66)] * 2, 512)
  assert fixed.shape == (512, 512, 3) and [r.shape for r in references] == [(512, 544, 3)] * 2
  fixed, (reference,) = images.fix_edit(blank(64, 64), [blank(64, 128)], 512)
  assert (fixed.shape, reference.shape) == ((512, 512, 3), (*images.fixed_size(64, 128, 512), 3))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
  "side, message", [(12_000, "12000x12000 pixels .* are more than 100,000,000"), (30_000, "exceeds limit")]
)
def test_what_would_fill_the_memory_is_not_decoded(side, message):
  with pytest.raises(UserError, match=f"cannot read image big: .*{message}"):
    images.decode_image(bomb(side, side), "big")


def test_an_empty_file():
  with pytest.raises(UserError, match=r"cannot read image a\.png: the file is empty"):
    images.decode_image(b"", "a.png")
