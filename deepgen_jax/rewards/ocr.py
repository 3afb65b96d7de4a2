"""Does the image show the text that its prompt quotes? PP-OCRv4 by way of rapidocr-onnxruntime, which ships its models.

The targets of a prompt are what it puts in double quotes, straight or typographic; a prompt without any has no score. Every way
of scoring compares letters and digits of ASCII alone: spaces, punctuation and other scripts are dropped on both sides.

    new     1 - edit distance / length of the target, at the nearest of the lines read and of up to `max_ngram` neighbouring
            lines put together; of two distances, plain and with glyphs that look alike (0 o, 1 i j l, 5 s, v w) made equal,
            the smaller; the reference's scorer of that name. 0 .. 1
    exact   1 if some candidate is the target, else 0
    dense   log-probability of the target under the recogniser's frames, per character: rises smoothly where the others are
            still 0. -20 .. 0

Several targets count by their length. Departures from the reference: no target, or none with a letter or digit of ASCII, is
missing, not 0; so is an image that the recogniser fails on.

Measured on 60 rendered words (data/words.py) each: all are read at 32 to 512 pixels; at 24, 85 %. Enlarging images beforehand
reads no more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deepgen_jax.errors import UserError, nearest
from deepgen_jax.rewards import ctc
from deepgen_jax.rewards.reward import Item, Missing, PerItem, Reward

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DETECTION_SIDE = 256  # pixels: smaller images are enlarged for the detector until their shorter side has as many
FLOOR = -20.0  # of the dense score; probabilities below e^-20 mean nothing
_QUOTED = re.compile('"([^"]*)"|\u201c([^\u201d]*)\u201d')
_ALIKE = str.maketrans("01ij5v", "olllsw")


@dataclass(frozen=True)
class Line:
  """A line of text in an image: what was read, and the recogniser's probabilities [T, 1 + len(ALPHABET)], blank first."""

  text: str
  frames: np.ndarray


def ocr(scoring: str = "new", case_sensitive: bool = True, max_ngram: int = 3) -> Reward:
  """scoring: "new", "exact" or "dense" (see the module). Raises UserError, also where rapidocr-onnxruntime is missing."""
  if scoring not in _SCORINGS:
    raise UserError(f"reward 'ocr': unknown scoring {scoring!r}; use {', '.join(_SCORINGS)}.{nearest(scoring, _SCORINGS)}")
  if max_ngram < 1:
    raise UserError(f"reward 'ocr': max_ngram is {max_ngram}; it must be at least 1")
  reader, score = Reader(), _SCORINGS[scoring]

  def judge(item: Item) -> float:
    wanted = targets(item.prompt)
    if not wanted:
      raise Missing("the prompt quotes no text")
    wanted = [text for text in (normalise(target, case_sensitive) for target in wanted) if text]
    if not wanted:
      raise Missing("the quoted text has no letter or digit of ASCII")
    lines = reader(item.image, whole=scoring == "dense")
    scores = [score(target, lines, case_sensitive, max_ngram) for target in wanted]
    return np.average(scores, weights=[len(target) for target in wanted])

  return PerItem("ocr", judge)


def targets(prompt: str) -> list[str]:
  """What the prompt quotes, in order."""
  return [straight or curly for straight, curly in _QUOTED.findall(prompt) if straight or curly]


def normalise(text: str, case_sensitive: bool = True) -> str:
  """Its letters and digits of ASCII; in lower case unless case counts."""
  text = "".join(character for character in text if character in ALPHABET)
  return text if case_sensitive else text.lower()


def distance(a: str, b: str) -> int:
  """Levenshtein's: insertions, deletions and substitutions from a to b."""
  row = list(range(len(b) + 1))
  for i, left in enumerate(a, 1):
    diagonal, row[0] = row[0], i
    for j, right in enumerate(b, 1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
  return row[-1]


def spans(count: int, max_ngram: int) -> list[slice]:
  """Runs of up to max_ngram neighbours among `count`, and all of them."""
  found = [slice(start, start + n) for n in range(1, max_ngram + 1) for start in range(count - n + 1)]
  return found if count <= max_ngram else [*found, slice(0, count)]


def _candidates(lines: Sequence[Line], case_sensitive: bool, max_ngram: int) -> set[str]:
  read = [text for text in (normalise(line.text, case_sensitive) for line in lines) if text]
  return {"".join(read[span]) for span in spans(len(read), max_ngram)}


def score_new(target: str, lines: Sequence[Line], case_sensitive: bool = True, max_ngram: int = 3) -> float:
  """The reference's 'new' scoring of one normalised target: 0 .. 1."""
  alike = target.translate(_ALIKE)
  found = [len(target)]
  for text in _candidates(lines, case_sensitive, max_ngram):
    found.append(min(distance(text, target), distance(text.translate(_ALIKE), alike)))
  return 1 - min(found) / len(target)


def score_exact(target: str, lines: Sequence[Line], case_sensitive: bool = True, max_ngram: int = 3) -> float:
  """1 where the normalised target is among what was read, else 0."""
  return float(target in _candidates(lines, case_sensitive, max_ngram))


def score_dense(target: str, lines: Sequence[Line], case_sensitive: bool = True, max_ngram: int = 3) -> float:
  """log P(target) / length under the likeliest run of lines, not below FLOOR."""
  letters = ALPHABET if case_sensitive else ALPHABET[:36].lower()
  labels = [1 + letters.index(character) for character in target]
  logs = [np.log(np.maximum(_fold(line.frames, letters), np.exp(2 * FLOOR))) for line in lines]
  found = [ctc.log_prob(np.concatenate(logs[span]), labels) / len(target) for span in spans(len(logs), max_ngram)]
  return max([FLOOR, *found])


def _fold(frames: np.ndarray, letters: str) -> np.ndarray:
  """Adds the columns of capitals to those of small letters, where `letters` has no capitals."""
  columns = [0, *(1 + letters.index(c if c in letters else c.lower()) for c in ALPHABET)]
  folded = np.zeros((len(frames), 1 + len(letters)), np.float64)
  np.add.at(folded.T, columns, frames.T)
  return folded


_SCORINGS: dict[str, Callable[..., float]] = {"new": score_new, "exact": score_exact, "dense": score_dense}


class Reader:
  """Finds and reads the lines of an image. Not for several threads at once: the detector keeps state."""

  def __init__(self):
    """Raises UserError if rapidocr-onnxruntime isn't there."""
    try:
      from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
      raise UserError(
        f"reward 'ocr' needs rapidocr-onnxruntime ({error}), which there is for Python up to 3.12. "
        "Run: pip install deepgen_jax[ocr]"
      ) from error
    # One thread: more of them spin between small models, for 2.5 times the processor time.
    self._engine = RapidOCR(
      det_limit_side_len=DETECTION_SIDE, det_limit_type="min", use_cls=False, intra_op_num_threads=1, inter_op_num_threads=1
    )
    self._recogniser = self._engine.text_rec
    place = {character: 1 + i for i, character in enumerate(ALPHABET)}
    self._columns = [place.get(character, 0) for character in self._recogniser.postprocess_op.character]

  def __call__(self, image: np.ndarray, whole: bool = False) -> list[Line]:
    """uint8 [H,W,3] RGB -> its lines, from top to bottom and left to right; with `whole`, the image as one line if none is
    found.
    """
    image = np.ascontiguousarray(image[..., ::-1])  # the models know BGR
    boxes, _ = self._engine.auto_text_det(image)
    crops = [] if boxes is None else self._engine.get_crop_img_list(image, boxes)
    return [self._read(crop) for crop in (crops or ([image] if whole else []))]

  def _read(self, crop: np.ndarray) -> Line:
    _, height, width = self._recogniser.rec_image_shape
    pixels = self._recogniser.resize_norm_img(crop, max(width / height, crop.shape[1] / crop.shape[0]))
    predicted = self._recogniser.session(pixels[None])[0]
    text, _ = self._recogniser.postprocess_op(predicted)[0]
    frames = np.zeros((predicted.shape[1], 1 + len(ALPHABET)))
    np.add.at(frames.T, self._columns, predicted[0].T)  # what scoring drops counts as blank
    return Line(text, frames)
