"""Brings weights in, and back out to PyTorch: `python -m deepgen_jax.convert --source DIR --target OUT`.

--source and --base take model directories and training workdirs of ours, DeepGen and SD3 folders in the diffusers format,
Qwen2.5-VL folders, PEFT adapters, and the reference's .pth checkpoints; what the first lacks comes from the next. Tensors pass
through one at a time, in their stored dtype.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from etils import epath

from deepgen_jax import checkpoint
from deepgen_jax.cli import parse
from deepgen_jax.data.tokens import copy_tokenizer
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.models.deepgen import PARTS
from deepgen_jax.weights import diffusers, lora_format, model_dir
from deepgen_jax.weights.load import Opened, Weights, look_at, open_weights, resolve
from deepgen_jax.weights.tensors import Tensor, describe

_NAMES = {"vlm": "VLM", "scb": "SCB and think tokens", "dit": "DiT", "vae": "VAE"}


def convert(weights: Weights, target, to: str = "deepgen_jax", keep_lora: bool = False) -> None:
  """Writes `weights` as a model directory ("deepgen_jax") or a folder for the PyTorch libraries ("diffusers").

  LoRA is merged or, with keep_lora, kept beside the kernels: as lora.safetensors, or as PEFT adapters in lora/vlm, lora/dit.
  Raises UserError if the target exists and isn't empty, and for NaN; then nothing is left of it.
  """
  folder = epath.Path(target)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"--target {target} exists and isn't empty; give a new folder")
  tokenizer = weights.tokenizer()
  weights = weights.untied() if keep_lora else weights.merged()
  try:
    copy_tokenizer(weights.tokenizer_dir, folder / "tokenizer")
    if to == "deepgen_jax":
      model_dir.save_leaves(folder, weights.config, weights.leaves, weights.factors)
      return
    for part in PARTS:
      own = {name.removeprefix(f"{part}/"): pair for name, pair in weights.factors.items() if name.startswith(f"{part}/")}
      if own:
        lora_format.save_adapter(folder / "lora" / part, diffusers.table(part, weights.config), own, base=str(target))
    diffusers.save(folder, weights.config, weights.leaves, tokenizer, save_tokenizer=False)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True) if "://" not in str(folder) else None
    raise


def inspect(path) -> str:
  """What a folder or checkpoint holds, as text; no value of a tensor is read."""
  found = resolve(path)
  if (found / "checkpoints").is_dir():
    return _inspect_workdir(found)
  opened = look_at(path)
  lines = [f"{opened.kind}: {opened.where}", f"stage: {_stage(opened)}"]
  for part in opened.parts:
    tensors = opened.leaves.get(part) or opened.states[part]
    lines.append(f"{_NAMES[part]}: {describe(list(tensors.values()))}")
  if opened.pairs:
    ranks = sorted({a.shape[0] for a, _ in opened.pairs.values()})
    both = [tensor for pair in opened.pairs.values() for tensor in pair]
    lines.append(f"LoRA: {len(opened.pairs)} modules, rank {', '.join(map(str, ranks))}, {describe(both)}")
  if opened.factors:
    both = [tensor for pair in opened.factors.values() for tensor in (pair.a, pair.b)]
    lines.append(f"LoRA: {len(opened.factors)} kernels, {describe(both)}")
  if missing := [_NAMES[part] for part in PARTS if part not in opened.parts]:
    lines.append(f"missing for a whole model: {', '.join(missing)}" + ("" if "SCB" in missing[0] else " (give with --base)"))
  if opened.tokenizer is None:
    lines.append("no tokenizer")
  return "\n".join(lines)


def _inspect_workdir(folder: epath.Path) -> str:
  config = checkpoint.read_config(folder)
  step, stored = checkpoint.stored(folder)
  lines = [f"training workdir: {folder}", f"stage: {config['stage']}, {step} of {config['steps']} updates"]
  for kind, what in (("params", "trained"), ("ema", "their moving average")):
    by_part: dict[str, list[Tensor]] = {}
    for name, tensor in stored.items():
      if name.startswith(f"{kind}/"):
        by_part.setdefault(name.split("/")[1], []).append(tensor)
    lines += [f"{_NAMES.get(part, part)}, {what}: {describe(tensors)}" for part, tensors in by_part.items()]
  return "\n".join([*lines, f"frozen parts: {config['init']}"])


def _stage(opened: Opened) -> str:
  if opened.kind == "PEFT adapter":
    return "an adapter for another model"
  if "scb" not in opened.parts:
    return "a base without SCB: stage 1 (align) starts here"
  if opened.kind == "training checkpoint":
    return "2 or 3 (DiT and LoRA trained)" if "dit" in opened.parts or opened.pairs else "1 (SCB and think tokens trained)"
  return "a whole model" if set(opened.parts) == set(PARTS) else "a part of a model"


def build_parser() -> argparse.ArgumentParser:
  """The command's options, as in design 4.1."""
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.convert",
    description=__doc__,
    epilog="examples: convert --source DeepGen-1.0-diffusers --target models/deepgen; "
    "convert --source model.pt --base Qwen2.5-VL-3B-Instruct --base UniPic2-SD3.5M-Kontext-2B --target models/rl; "
    "convert --source runs/sft --target out --to diffusers; convert --inspect model.pt",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--source", metavar="PATH", help="what to convert")
  parser.add_argument("--base", action="append", default=[], metavar="PATH", help="what the source lacks; may be repeated")
  parser.add_argument("--target", metavar="DIR", help="a new folder")
  parser.add_argument("--to", choices=("deepgen_jax", "diffusers"), default="deepgen_jax", help="format of the target")
  parser.add_argument(
    "--lora_alpha", type=float, metavar="N", help="of LoRA in a checkpoint, which doesn't say; default 2 x rank"
  )
  parser.add_argument("--keep_lora", action="store_true", help="keep LoRA beside the kernels instead of merging it")
  parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a workdir: EMA where it is kept, or raw")
  parser.add_argument("--inspect", metavar="PATH", help="print what PATH holds, and do nothing else")
  return parser


def main() -> None:
  arguments = parse(build_parser(), sys.argv[1:])
  if arguments.inspect:
    print(inspect(arguments.inspect))
    return
  paths = [path for path in (arguments.source, *arguments.base) if path]
  if not paths or not arguments.target:
    raise UserError("give --source (or several --base that make a model) and --target, or --inspect; see --help")
  weights = open_weights(paths[0], paths[1:], arguments.weights, lora_alpha=arguments.lora_alpha)
  convert(weights, arguments.target, arguments.to, arguments.keep_lora)
  print(arguments.target)


if __name__ == "__main__":
  run_command(main)
