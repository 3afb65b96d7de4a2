"""Rendered words, the text-rendering data of the tiny default: short words in a colour on a coloured background.

Everything is drawn by PIL with its built-in font; nothing is stored. One word in ten is held out, by the hash of the word.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deepgen_jax.data.composition import text_hash

IMAGE_SIZE = 64
HELD_OUT_SHARE = 0.1
MIN_CONTRAST = 60  # difference in luminance, of 255
COLOURS = {
  "white": (255, 255, 255),
  "black": (20, 20, 20),
  "red": (214, 39, 40),
  "orange": (255, 140, 20),
  "yellow": (255, 221, 51),
  "green": (44, 150, 60),
  "blue": (40, 90, 210),
  "purple": (130, 60, 170),
  "pink": (250, 150, 190),
  "brown": (120, 75, 45),
}
WORDS = tuple(
  """
  ACE ACT ADD AGE AIR ALL ANT ART ASK BAD BAG BALL BAND BANK BAR BAT BEAR BED BEE BELL BEST BIG BIKE BIRD BLUE BOAT BOLD BOOK
  BOX BOY BUS BUY CAB CAKE CALL CAP CAR CARD CASH CAT CITY CLUB COAT COIN COLD COOK COOL CORN COW CUP DAY DEAL DEER DESK DOG
  DOLL DOOR DOWN DRUM DUCK EAR EAST EASY EAT EGG END EXIT EYE FACE FACT FAN FARM FAST FIRE FISH FLAG FLY FOG FOOD FOOT FOX
  FREE FROG FULL FUN GAME GAS GATE GIFT GIRL GO GOAL GOLD GOOD GRAY HAIR HALL HAND HAT HEAD HELP HEN HERO HI HILL HOME HOPE
  HOT HOUR ICE IDEA IN INK IRON JAM JAR JET JOB JOKE JOY JUMP KEY KIND KING KISS KITE LAKE LAMP LAND LEAF LEFT LEG LIFE LIKE
  LION LOCK LOG LONG LOVE LUCK MAIL MAN MAP MILK MIND MOM MOON MUD NAME NET NEW NEXT NICE NIGHT NO NOSE NOTE NOW OAK OFF OIL
  OK OLD ON ONE OPEN OUT OWL PAGE PAN PARK PASS PEN PET PIE PIG PINK PLAN PLAY POOL POST PUSH RAIN RAT READ RED REST RICE RING
  ROAD ROCK ROSE RUN SAFE SALE SALT SAND SEA SEED SHIP SHOE SHOP SIGN SING SKY SLOW SNOW SOAP SOFT SONG SOUP STAR STOP SUN
  SWIM TAXI TEA TEN TENT TIME TOP TOWN TOY TREE TRUE TWO UP VAN WAIT WALK WALL WARM WAVE WAY WEST WIND WINE WIN WOLF WOOD YES
  YOU ZOO
  """.split()  # noqa: SIM905
)


def is_held_out(word: str) -> bool:
  """Whether the word never enters training, in any colours."""
  return text_hash(word) < HELD_OUT_SHARE


def caption(word: str, ink: str, background: str) -> str:
  """The caption of a rendered word."""
  return f'the word "{word}" in {ink} on a {background} background'.replace(" a orange", " an orange")


def render(word: str, ink: str, background: str, size: int = IMAGE_SIZE) -> np.ndarray:
  """The word in the middle, as large as fits with a margin of 1/16 on each side: uint8 [size,size,3]."""
  image = Image.new("RGB", (size, size), COLOURS[background])
  draw = ImageDraw.Draw(image)
  points = size // 2
  while points > 5 and draw.textlength(word, font=_font(points)) > size - size // 8:
    points -= 1
  draw.text((size / 2, size / 2), word, fill=COLOURS[ink], font=_font(points), anchor="mm")
  return np.array(image)


@functools.cache
def _font(points: int):
  return ImageFont.load_default(points)


@functools.cache
def combinations(held_out: bool) -> tuple[tuple[str, str, str], ...]:
  """All (word, ink, background) of training or of the held-out words, in a fixed order; pairs of colours one can read."""
  pairs = [(ink, ground) for ink in COLOURS for ground in COLOURS if abs(_luminance(ink) - _luminance(ground)) > MIN_CONTRAST]
  return tuple((word, *pair) for word in WORDS if is_held_out(word) == held_out for pair in pairs)


def _luminance(colour: str) -> float:
  """0..255 (Rec. 601)."""
  return float(np.dot(COLOURS[colour], (0.299, 0.587, 0.114)))
