"""Makes images: `python -m deepgen_jax.generate --model runs/sft --prompt "a red apple" --output apple.png`.

With `--image FILE ...` it edits: one reference or several.
"""

from __future__ import annotations

import argparse
import sys

from etils import epath

from deepgen_jax.cli import parse, start_command
from deepgen_jax.data.images import load_image
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.pipeline import DeepGenPipeline


def build_parser() -> argparse.ArgumentParser:
  """The command's options (design 4.1)."""
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.generate",
    description="Generates images from text, or edits reference images.",
    epilog='example: python -m deepgen_jax.generate --model runs/sft --prompt "make it green" --image in.png --output out.png',
    allow_abbrev=False,
  )
  parser.add_argument("--model", required=True, metavar="DIR", help="model directory, training workdir or diffusers folder")
  parser.add_argument("--prompt", required=True, metavar="TEXT")
  parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="reference images, in order")
  parser.add_argument("--negative_prompt", default="", metavar="TEXT")
  parser.add_argument("--output", required=True, metavar="FILE.png", help="with --num_images N: FILE_0.png, FILE_1.png, ...")
  parser.add_argument("--height", type=int, metavar="H", help="pixels, a multiple of 16; give --width too")
  parser.add_argument("--width", type=int, metavar="W")
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--guidance", type=float, default=4.0, help="1 or less: no negative branch")
  parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i")
  parser.add_argument("--num_images", type=int, default=1, metavar="N")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype; bfloat16 on TPU and GPU by default")
  parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a workdir: EMA where it is kept, or raw")
  parser.add_argument(
    "--base", action="append", metavar="PATH", help="what --model lacks, e.g. frozen parts of a workdir; may be repeated"
  )
  return parser


def check(arguments) -> None:
  """What can be known to be wrong before a model is loaded."""
  if not arguments.prompt.strip():
    raise UserError("--prompt is empty; say what to make")
  if (arguments.height is None) != (arguments.width is None):
    raise UserError("give both --height and --width, or neither")
  for name in ("height", "width"):
    value = getattr(arguments, name)
    if value is not None and (value <= 0 or value % 16):
      raise UserError(f"--{name} {value}: must be a positive multiple of 16")
  for name in ("steps", "num_images"):
    if getattr(arguments, name) < 1:
      raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
  output = epath.Path(arguments.output)
  if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
    raise UserError(f"--output {arguments.output}: name a .png, .jpg or .webp file")
  if output.is_dir():
    raise UserError(f"--output {arguments.output} is a folder")
  if blocker := next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None):
    raise UserError(f"--output {arguments.output}: {blocker} is a file, not a folder")


def output_files(output: str, count: int) -> list[epath.Path]:
  """out.png, or out_0.png ... for several."""
  path = epath.Path(output)
  return [path] if count == 1 else [path.with_name(f"{path.stem}_{i}{path.suffix}") for i in range(count)]


def main() -> None:
  start_command()
  arguments = parse(build_parser(), sys.argv[1:])
  check(arguments)
  images = [load_image(file) for file in arguments.image]
  pipe = DeepGenPipeline.from_pretrained(arguments.model, dtype=arguments.dtype, base=arguments.base, weights=arguments.weights)
  count = arguments.num_images
  out = pipe(
    [arguments.prompt] * count,
    image=[images] * count if images else None,
    negative_prompt=arguments.negative_prompt,
    height=arguments.height,
    width=arguments.width,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    seed=arguments.seed,
  )
  files = output_files(arguments.output, count)
  try:
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(files, out.images):
      with file.open("wb") as handle:
        image.save(handle, format={".png": "PNG", ".webp": "WEBP"}.get(file.suffix.lower(), "JPEG"))
  except OSError as error:
    raise UserError(f"can't write {arguments.output}: {error}") from error
  print("\n".join(str(file) for file in files))


if __name__ == "__main__":
  run_command(main)
