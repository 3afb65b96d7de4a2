"""A folder in the diffusers format, written by the stock libraries: what is read, and the whole pipeline against PyTorch."""

import copy
import dataclasses
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift  # noqa: E402

from deepgen_jax.errors import UserError  # noqa: E402
from deepgen_jax.models.deepgen import Conditioning  # noqa: E402
from deepgen_jax.models.lora import path_name  # noqa: E402
from deepgen_jax.pipeline import DeepGenPipeline  # noqa: E402
from deepgen_jax.weights import hf_config  # noqa: E402
from deepgen_jax.weights.load import load_model  # noqa: E402
from tests.models import oracle  # noqa: E402
from tests.small import random_image  # noqa: E402
from tests.weights.reference import CONFIG, Reference  # noqa: E402

SAMPLES, STEPS = 1e-3, 6  # design: a six-step generation or edit agrees within 1e-3
WIDE, LOW = random_image(64, 96, seed=1), random_image(32, 64, seed=2)
PROMPTS = ["a red apple", "an old bicycle in the rain, seen from above"]
NEGATIVE = "blurry, low quality"


@pytest.fixture(scope="module")
def reference():
  return Reference()


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
  folder = tmp_path_factory.mktemp("diffusers")
  reference.save(folder)
  return folder


@pytest.fixture(scope="module")
def pipe(folder):
  return DeepGenPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def parameters(folder):
  return leaves(folder)


@pytest.fixture
def copied(folder, tmp_path):
  """The folder, to be changed."""
  return shutil.copytree(folder, tmp_path / "copy")


def leaves(folder):
  """{our path: array} of everything that is loaded."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(load_model(folder)[1])}


def assert_equal(ours, expected):
  assert ours.keys() == expected.keys()
  for name in expected:
    assert ours[name].dtype == np.float32
    np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_sizes_come_from_the_config_files(pipe):
  assert pipe.config == CONFIG


@pytest.mark.parametrize("images", [[], [WIDE], [WIDE, LOW]], ids=["text", "one reference", "two references"])
def test_conditioning(reference, pipe, images):
  """In a batch with another prompt of the same kind, so that there is padding."""
  theirs = [reference.condition(PROMPTS[0], images), reference.condition(PROMPTS[1], images[::-1])]
  ours = pipe.encode_prompt(PROMPTS, [images, images[::-1]])
  for i, (pooled, context) in enumerate(theirs):
    oracle.assert_close(ours.pooled[i], pooled)
    oracle.assert_close(np.asarray(ours.context)[i, np.asarray(ours.mask)[i]], context)


def test_velocity_with_ragged_references(reference, pipe):
  """Conditioning comes from the oracle, with garbage in its pads."""
  latents, timesteps = draw(2, 8, 8, 16), np.array([1000, 371.25], np.float32)
  references = [[draw(8, 12, 16, seed=1), draw(4, 8, 16, seed=2)], [draw(4, 6, 16, seed=3)]]
  theirs = [reference.condition(prompt) for prompt in PROMPTS]
  length = max(len(context) for _, context in theirs) + 3
  context, mask = np.full((2, length, CONFIG.dit.context_size), 5.0, np.float32), np.zeros((2, length), bool)
  for i, (_, rows) in enumerate(theirs):
    context[i, : len(rows)], mask[i, : len(rows)] = rows, True
  cond = Conditioning(pooled=np.stack([pooled for pooled, _ in theirs]), context=context, mask=mask)
  ours = pipe.velocity(latents, timesteps, cond, references)
  for i in range(2):
    extra = [torch.tensor(x) for x in references[i]]
    expected = reference.velocity(torch.tensor(latents[i]), timesteps[i], theirs[i], extra)
    oracle.assert_close(ours[i], expected)
    assert oracle.relative_error(reference.velocity(torch.tensor(latents[i]), timesteps[i], theirs[i]), expected) > 0.05


@pytest.mark.parametrize("image", [WIDE, LOW], ids=["64x96", "32x64"])
def test_encode_and_decode(reference, pipe, image):
  latent = reference.encode(image)
  oracle.assert_close(pipe.encode_image(image)[0], latent)
  oracle.assert_close(pipe.decode_latents(latent.numpy()[None])[0], reference.decode(latent))


def test_generation(reference, pipe):
  """Six steps with guidance, two prompts of unequal length in one call."""
  noise = draw(2, 4, 6, 16)
  run = lambda kind: (
    pipe(
      PROMPTS, negative_prompt=NEGATIVE, height=32, width=48, num_inference_steps=STEPS, latents=noise, output_type=kind
    ).images
  )
  latents, images = run("latent"), run("np")
  decoded = pipe.decode_latents(latents)
  for i, prompt in enumerate(PROMPTS):
    positive, negative = reference.condition(prompt), reference.condition(NEGATIVE)
    expected = reference.sample(torch.tensor(noise[i]), positive, negative, steps=STEPS)
    pixels = reference.decode(expected)
    oracle.assert_close(latents[i], expected, SAMPLES)
    oracle.assert_close(decoded[i], pixels, SAMPLES)
    oracle.assert_close(images[i], ((pixels + 1) / 2).clip(0, 1), SAMPLES)


@pytest.mark.parametrize("dynamic", [False, True])
def test_other_schedules(reference, pipe, folder, tmp_path, dynamic):
  """What scheduler_config.json says is what is sampled: another static shift, and one that follows from the size."""
  kind = type(reference.scheduler)
  theirs = copy.copy(reference)
  theirs.scheduler = kind(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.16) if dynamic else kind(shift=1.7)
  theirs.scheduler.save_pretrained(tmp_path)
  ours = copy.copy(pipe)
  ours.config = dataclasses.replace(pipe.config, scheduler=hf_config.read_scheduler(tmp_path / "scheduler_config.json"))
  noise = draw(2, 4, 6, 16)
  out = ours(
    PROMPTS, negative_prompt=NEGATIVE, height=32, width=48, num_inference_steps=STEPS, latents=noise, output_type="latent"
  )
  c = theirs.scheduler.config
  sizes = (c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
  shift = {"mu": calculate_shift(4 * 6 // 4, *sizes)} if dynamic else {}
  positive, negative = reference.condition(PROMPTS[0]), reference.condition(NEGATIVE)
  expected = theirs.sample(torch.tensor(noise[0]), positive, negative, steps=STEPS, **shift)
  oracle.assert_close(out.images[0], expected, SAMPLES)
  usual = reference.sample(torch.tensor(noise[0]), positive, negative, steps=STEPS)
  assert oracle.relative_error(usual, expected) > 0.01


@pytest.mark.parametrize("second", [False, True], ids=["one reference", "two references"])
def test_edit(reference, pipe, second):
  """The output's area makes the first reference 64x64 and leaves the second as it is."""
  noise, given = draw(1, 4, 8, 16), [WIDE, Image.fromarray(LOW)][: 1 + second]
  run = lambda kind: (
    pipe(
      "make it green",
      image=given,
      negative_prompt=NEGATIVE,
      height=32,
      width=64,
      num_inference_steps=STEPS,
      latents=noise,
      output_type=kind,
    ).images
  )
  images = [np.array(Image.fromarray(WIDE).resize((64, 64), Image.Resampling.BICUBIC)), LOW][: 1 + second]
  positive, negative = (reference.condition(text, images) for text in ("make it green", NEGATIVE))
  expected = reference.sample(torch.tensor(noise[0]), positive, negative, [reference.encode(x) for x in images], STEPS)
  oracle.assert_close(run("latent")[0], expected, SAMPLES)
  oracle.assert_close(run("np")[0], ((reference.decode(expected) + 1) / 2).clip(0, 1), SAMPLES)


def test_bfloat16_weights_load(reference, parameters, tmp_path):
  """Every part stored in bfloat16 gives the rounded values, as float32."""
  reference.save(tmp_path, torch.bfloat16)
  rounded = {name: leaf.astype(ml_dtypes.bfloat16).astype(np.float32) for name, leaf in parameters.items()}
  assert_equal(leaves(tmp_path), rounded)


def rename(folder, pattern, replacement):
  file = folder / "vlm" / "model.safetensors"
  tensors = load_file(file)
  renamed = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
  assert renamed.keys() != tensors.keys()
  save_file(renamed, file)


def test_spellings_of_the_vlm(folder, parameters, copied):
  """The libraries store `visual.*` and `model.layers.*`; their modules say `model.visual.*` and `model.language_model.*`."""
  stored = load_file(folder / "vlm" / "model.safetensors")
  assert any(key.startswith("visual.") for key in stored) and any(key.startswith("model.layers.") for key in stored)
  rename(copied, r"^model\.", "model.language_model.")
  assert_equal(leaves(copied), parameters)
  rename(copied, r"^visual\.", "model.visual.")
  assert_equal(leaves(copied), parameters)


def test_a_stored_copy_of_the_tied_head_is_ignored(parameters, copied):
  file = copied / "vlm" / "model.safetensors"
  tensors = load_file(file)
  save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
  assert_equal(leaves(copied), parameters)


def test_a_flat_vlm_config(pipe, parameters, copied):
  """Older releases keep the text model's sizes at the top, and M-RoPE under `rope_scaling`."""
  file = copied / "vlm" / "config.json"
  values = json.loads(file.read_text())
  text = values.pop("text_config")
  rope = text.pop("rope_parameters")
  old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
  file.write_text(json.dumps({**text, **values, **old, "model_type": "qwen2_5_vl"}))
  assert load_model(copied, parts=())[0] == pipe.config
  assert_equal(leaves(copied), parameters)


def edit_tensors(name, change):
  """A mistake: `change` alters the tensors of a file in place."""

  def apply(folder):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)

  return apply


def edit_json(name, change):
  def apply(folder):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))

  return apply


def edit_bytes(name, change):
  def apply(folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(change(content))

  return apply


def test_parts_in_several_files(reference, parameters, tmp_path):
  """With an index beside them, as large models come; a missing file, and a damaged index, are named."""
  reference.save(tmp_path, max_shard_size="100KB")
  for part, stem in (("vlm", "model"), ("transformer", "diffusion_pytorch_model")):
    assert len(list((tmp_path / part).glob("*.safetensors"))) > 1 and not (tmp_path / part / f"{stem}.safetensors").exists()
  assert_equal(leaves(tmp_path), parameters)
  gone = min((tmp_path / "vlm").glob("*.safetensors"))
  gone.unlink()
  with pytest.raises(UserError, match=rf"model\.safetensors\.index\.json names files that are missing: {gone.name}"):
    load_model(tmp_path)
  (tmp_path / "vlm" / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(UserError, match=r"index\.json is damaged"):
    load_model(tmp_path)


def remove(name):
  return lambda folder: (folder / name).unlink()


DIT, VAE = "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
VLM, SCB = "vlm/model.safetensors", "connector/model.safetensors"
DIT_JSON, VLM_JSON, RULE = "transformer/config.json", "vlm/config.json", "scheduler/scheduler_config.json"
BIAS, NORM, MERGER = "proj_out.bias", "transformer_blocks.1.attn.norm_k.weight", "visual.merger.mlp.2.bias"
TYPO = "encoder.conv_inn.bias"
NARROW, FLAT = np.zeros(31, np.float32), np.zeros(3, np.float32)
MISTAKES = {  # part, what is done to the folder, words of the message
  "no weights": ("dit", remove(DIT), [DIT, "missing"]),
  "no connector weights": ("scb", remove(SCB), [SCB, "missing"]),
  "no config": ("vae", remove("vae/config.json"), ["vae/config.json", "missing"]),
  "no scheduler": ("dit", remove(RULE), [RULE, "missing"]),
  "no tokenizer": ("dit", lambda folder: shutil.rmtree(folder / "tokenizer"), ["tokenizer"]),
  "two missing": (
    "dit",
    edit_tensors(DIT, lambda t: (t.pop(BIAS), t.pop(NORM))),
    [DIT, f"{BIAS}: missing", f"{NORM}: missing"],
  ),
  "no think tokens": ("scb", edit_tensors(SCB, lambda t: t.pop("meta_queries")), [SCB, "meta_queries"]),
  "flat think tokens": ("scb", edit_tensors(SCB, lambda t: t.update(meta_queries=FLAT)), [SCB, "meta_queries"]),
  "unknown tensor": ("vae", edit_tensors(VAE, lambda t: t.update({TYPO: FLAT})), [VAE, f"{TYPO}: unknown key"]),
  "wrong shape": ("vlm", edit_tensors(VLM, lambda t: t.update({MERGER: NARROW})), [VLM, f"{MERGER}: shape (31,)", "(32,)"]),
  "truncated": ("dit", edit_bytes(DIT, lambda content: content[:-100]), [DIT, "damaged"]),
  "no safetensors": ("scb", edit_bytes(SCB, lambda _: b"PK, a zip archive"), [SCB, "damaged"]),
  "no JSON": ("dit", edit_bytes(DIT_JSON, lambda content: content[:-9]), [DIT_JSON, "no JSON"]),
  "no text size": (
    "vlm",
    edit_json(VLM_JSON, lambda v: v["text_config"].pop("hidden_size")),
    [VLM_JSON, "hidden_size"],
  ),
  "no vision sizes": ("vlm", edit_json(VLM_JSON, lambda v: v.pop("vision_config")), [VLM_JSON, "vision_config"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_with_file_and_key(copied, mistake):
  part, apply, expected = MISTAKES[mistake]
  apply(copied)
  with pytest.raises(UserError) as error:
    load_model(copied, parts=(part,))
  for words in expected:
    assert words in str(error.value)


def test_a_folder_without_a_connector_is_no_whole_model(copied):
  shutil.rmtree(copied / "connector")
  with pytest.raises(UserError, match="lacks scb"):
    DeepGenPipeline.from_pretrained(copied)
