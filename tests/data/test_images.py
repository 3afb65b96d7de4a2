import numpy as np
import pytest
from PIL import Image

from deepgen_jax.data import images
from deepgen_jax.errors import UserError


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
