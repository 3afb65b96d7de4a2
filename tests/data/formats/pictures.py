"""Pictures that say which they are, for tests of the formats."""

import io

import numpy as np
from PIL import Image


def picture(number, height=8, width=10):
  """PNG bytes, all of colour `number`."""
  data = io.BytesIO()
  Image.new("RGB", (width, height), (number, number, number)).save(data, format="PNG")
  return data.getvalue()


def jpeg(pixels):
  """JPEG bytes of uint8 [H,W,3]."""
  data = io.BytesIO()
  Image.fromarray(pixels).save(data, format="JPEG")
  return data.getvalue()


def number(image):
  """The number that a decoded picture was made of."""
  assert (image == image[0, 0, 0]).all() and image.dtype == np.uint8
  return int(image[0, 0, 0])


def numbers(sample):
  """Of target and references."""
  return [number(image) for image in (sample.target, *sample.references)]
