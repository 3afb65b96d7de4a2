"""A DeepGen folder in the diffusers format: what is where, and writing one that the stock libraries load.

    model_index.json
    transformer/ vae/   config.json, diffusion_pytorch_model.safetensors     diffusers' SD3Transformer2DModel, AutoencoderKL
    vlm/                config.json, model.safetensors                       transformers' Qwen2.5-VL
    connector/          config.json, model.safetensors                       SCB, projectors and think tokens
    scheduler/ tokenizer/ prompt_template.json

Large parts are in several files with an index. Which tensor is which stands in `names.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from etils import epath

from deepgen_jax.models.config import DeepGenConfig
from deepgen_jax.weights import hf_config
from deepgen_jax.weights import tensors as files
from deepgen_jax.weights.names import dit_table, scb_table, text_table, vae_table, vision_table
from deepgen_jax.weights.tensors import Tensor
from deepgen_jax.weights.torch_format import Table, to_state

# Part of ours -> its folder and its file there.
FILES = {
  "vlm": ("vlm", "model.safetensors"),
  "scb": ("connector", "model.safetensors"),
  "dit": ("transformer", "diffusion_pytorch_model.safetensors"),
  "vae": ("vae", "diffusion_pytorch_model.safetensors"),
}
# Older and newer spellings of the Qwen2.5-VL hierarchy -> the one of the name tables.
_SPELLINGS = (
  (r"^visual\.", "model.visual."),
  (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
  (r"^language_model\.lm_head\.", "lm_head."),
)
# The reference's prompt template (its configs/models), which its pipeline reads from the folder.
_TEMPLATE = {
  "IMG_START_TOKEN": "<|vision_start|>",
  "IMG_END_TOKEN": "<|vision_end|>",
  "IMG_CONTEXT_TOKEN": "<|image_pad|>",
  "IMG_START_TOKEN_FOR_GENERATION": False,
  "SYSTEM": "<|im_start|>system\n{system}<|im_end|>\n",
  "INSTRUCTION": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
  "SUFFIX": "<|im_end|>",
  "SUFFIX_AS_EOS": True,
  "SEP": "\n",
  "STOP_WORDS": ["<|im_end|>", "<|endoftext|>"],
  "GENERATION": "Generate an image: {input}",
  "CFG": "Generate an image.",
}


def is_diffusers_dir(path) -> bool:
  """Whether the folder looks like a pipeline in the diffusers format."""
  folder = epath.Path(path)
  return (folder / "model_index.json").exists() and (folder / "transformer").is_dir()


def is_vlm_dir(path) -> bool:
  """Whether the folder looks like a Qwen2.5-VL of transformers."""
  file = epath.Path(path) / "config.json"
  try:
    return file.exists() and json.loads(file.read_text()).get("model_type") == "qwen2_5_vl"
  except (ValueError, AttributeError):
    return False


def respell(name: str) -> str:
  """A name of the Qwen2.5-VL hierarchy, whichever release of transformers wrote it, as the name tables spell it."""
  for pattern, replacement in _SPELLINGS:
    name = re.sub(pattern, replacement, name)
  return name


def open_vlm(file) -> dict[str, Tensor]:
  """Tensors of a Qwen2.5-VL file (or of all that its index names)."""
  return {respell(key): tensor for key, tensor in files.open_files(file).items()}


def table(part: str, config: DeepGenConfig) -> Table:
  """The name table of a part of ours."""
  if part == "vlm":
    return Table.join({"text": text_table(config.text, config.scb.read_layers), "vision": vision_table(config.vision)})
  if part == "scb":
    return scb_table(config.scb)
  return dit_table(config.dit) if part == "dit" else vae_table(config.vae)


def save(path, config: DeepGenConfig, leaves: Mapping[str, Mapping[str, Tensor]], tokenizer, save_tokenizer=True) -> None:
  """Writes the folder, one tensor after the other; `model_index.json` comes last, when the rest is complete.

  leaves: of every part that is to be written, our paths. The reference's own pipeline file (deepgen_pipeline.py), which
  `DiffusionPipeline.from_pretrained` of the whole folder would run, isn't ours to write.
  """
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  for part, tree in leaves.items():
    name, file = FILES[part]
    (folder / name).mkdir(exist_ok=True)
    hf_config.write_json(folder / name / "config.json", _config_json(part, config, tree, tokenizer))
    files.write_files(folder / name / file, to_state(table(part, config), tree))
  (folder / "scheduler").mkdir(exist_ok=True)
  hf_config.write_json(folder / "scheduler" / "scheduler_config.json", hf_config.scheduler_json(config.scheduler))
  if save_tokenizer:  # else it is there already
    tokenizer.save_pretrained(folder / "tokenizer")
  hf_config.write_json(folder / "prompt_template.json", _TEMPLATE)
  index = {
    "_class_name": ["deepgen_pipeline", "DeepGenPipeline"],
    "_diffusers_version": hf_config.DIFFUSERS_VERSION,
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
  }
  hf_config.write_json(folder / "model_index.json", index)


def _config_json(part: str, config: DeepGenConfig, tree: Mapping[str, Tensor], tokenizer) -> dict:
  if part == "vlm":
    return hf_config.vlm_json(config.text, config.vision, tokenizer, str(tree["text/embedding"].dtype))
  if part == "scb":
    return hf_config.scb_json(config.scb) | {"image_size": config.image_size}
  return hf_config.dit_json(config.dit) if part == "dit" else hf_config.vae_json(config.vae)
