"""What DeepGenPipeline promises, on random weights: forms of its arguments, sizes, seeds, guidance, padding, saving."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

import deepgen_jax
from deepgen_jax import sharding
from deepgen_jax.data.tokens import build_tiny_tokenizer
from deepgen_jax.errors import UserError
from deepgen_jax.flow.schedule import inference_sigmas
from tests import small
from tests.small import VARIED as CONFIG
from tests.small import random_image

BATCH, SAMPLE = 1e-5, 1e-4  # design: across batch and padding, relative; for a whole sample
A, B = "a red apple", "a bicycle"
LOW, TALL = random_image(32, 64, seed=1), random_image(64, 32, seed=2)  # their size stays where the output is 32x64
# Few shapes, because each compiles.
OPTIONS = dict(height=32, width=64, num_inference_steps=2, output_type="latent")
PLAIN, GUIDED = OPTIONS | dict(guidance_scale=1.0), OPTIONS | dict(guidance_scale=3.0)
LATENT = (4, 8, 16)


@pytest.fixture(scope="module")
def params():
  return small.draw_params(CONFIG)


@pytest.fixture(scope="module")
def pipe(params):
  return deepgen_jax.DeepGenPipeline(CONFIG, params, build_tiny_tokenizer())


def assert_close(ours, expected, tolerance):
  ours, expected = np.asarray(ours), np.asarray(expected)
  assert ours.shape == expected.shape and np.isfinite(ours).all()
  error = np.abs(ours - expected).max() / np.abs(expected).max()
  assert error <= tolerance, f"relative error {error:.2g} > {tolerance:.2g}"


def differ(one, other):
  return np.abs(np.asarray(one) - np.asarray(other)).max() > 1e-3


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def padded(cond, more, garbage):
  """The same conditioning with `more` masked tokens of garbage after each sample."""
  pad = lambda x, value: np.concatenate([x, np.full((len(x), more, *x.shape[2:]), value, x.dtype)], axis=1)
  context, mask = np.array(cond.context), np.asarray(cond.mask)
  context[~mask] = garbage
  return deepgen_jax.Conditioning(pooled=np.asarray(cond.pooled), context=pad(context, garbage), mask=pad(mask, False))


def test_conditioning_is_a_pytree_of_three_fields(pipe):
  cond = pipe.encode_prompt(["", A])
  assert [field.name for field in dataclasses.fields(deepgen_jax.Conditioning)] == ["pooled", "context", "mask"]
  assert len(jax.tree.leaves(cond)) == 3
  assert cond.pooled.shape == (2, CONFIG.dit.pooled_size)
  assert cond.context.shape == (2, cond.mask.shape[1], CONFIG.dit.context_size)
  assert cond.mask.dtype == bool
  assert np.array_equal(cond.mask.sum(1), [cond.mask[0].sum(), cond.mask[0].sum() + len(A)])  # a token a byte
  assert differ(cond.pooled[0], cond.pooled[1])


def test_padding_of_conditioning_is_invisible(pipe):
  latents, cond = draw(2, *LATENT), pipe.encode_prompt(["", A])
  expected = pipe.velocity(latents, [900, 20.5], cond)
  assert_close(pipe.velocity(latents, [900, 20.5], padded(cond, 5, garbage=40.0)), expected, BATCH)
  assert differ(pipe.velocity(latents, [900, 20.5], dataclasses.replace(cond, mask=np.ones_like(cond.mask))), expected)


def test_prompts_with_and_without_images_in_one_call(pipe):
  """Each is what it is alone; PIL images and arrays are the same."""
  mixed = pipe.encode_prompt([A, ""], [[], [Image.fromarray(LOW), TALL]])
  for i, (text, images) in enumerate([(A, []), ("", [LOW, TALL])]):
    alone = pipe.encode_prompt([text], [images])
    assert_close(mixed.pooled[i], alone.pooled[0], BATCH)
    assert_close(mixed.context[i][mixed.mask[i]], alone.context[0][alone.mask[0]], BATCH)
  assert differ(mixed.pooled[1], pipe.encode_prompt([""]).pooled[0])


def test_encoding_never_resizes(pipe):
  odd = random_image(48, 64)
  with pytest.raises(ValueError, match="48x64"):
    pipe.encode_prompt([A], [[odd]])
  with pytest.raises(ValueError, match="48x64"):
    pipe.encode_image(odd)


def test_a_prompt_that_is_no_list_is_refused(pipe):
  with pytest.raises(UserError, match="list of prompts"):
    pipe.encode_prompt(A)
  with pytest.raises(UserError, match="2 prompts but images for 1"):
    pipe.encode_prompt([A, B], [[LOW]])


def test_encode_image_takes_the_mode(pipe):
  first, second = pipe.encode_image(LOW), pipe.encode_image(Image.fromarray(LOW))
  assert first.shape == (1, 4, 8, 16) and first.dtype == np.float32
  np.testing.assert_array_equal(first, second)


def test_decode_latents_does_not_clip(pipe):
  out = pipe.decode_latents(30 * draw(2, *LATENT))
  assert out.shape == (2, 32, 64, 3) and out.dtype == np.float32
  assert np.abs(out).max() > 1


def test_velocity_with_ragged_references(pipe):
  """numpy, with and without a leading 1; a sample is what it is alone; a reference matters."""
  latents, cond = draw(2, *LATENT), pipe.encode_prompt([A, B])
  one, two, three = draw(8, 12, 16, seed=1), draw(4, 8, 16, seed=2), draw(4, 4, 16, seed=3)
  out = pipe.velocity(latents, np.array([1000.0, 371.25]), cond, [[one, two], [three]])
  assert out.shape == latents.shape and out.dtype == np.float32
  led = pipe.velocity(latents, [1000.0, 371.25], cond, [[one[None], two[None]], [three[None]]])
  np.testing.assert_array_equal(led, out)
  row = jax.tree.map(lambda x: x[1:], cond)
  assert_close(pipe.velocity(latents[1:], [371.25], row, [[three]])[0], out[1], BATCH)
  without = pipe.velocity(latents[1:], [371.25], row)
  assert_close(pipe.velocity(latents, [1000.0, 371.25], cond, [[one, two], []])[1], without[0], BATCH)
  assert differ(without[0], out[1])
  with pytest.raises(UserError, match="2 latents but references for 1"):
    pipe.velocity(latents, [1000.0, 1.0], cond, [[one]])


def test_a_sample_has_its_own_seed(pipe):
  """Image i of a call starts from the noise of seed + i exactly, and ends where it ends alone."""
  noise = [np.asarray(jax.random.normal(jax.random.key(seed), LATENT)) for seed in (4, 5)]
  both, alone = pipe([A, B], seed=4, **PLAIN).images, pipe(B, seed=5, **PLAIN).images
  np.testing.assert_array_equal(pipe([A, B], latents=np.stack(noise), **PLAIN).images, both)
  np.testing.assert_array_equal(pipe(B, latents=noise[1][None], **PLAIN).images, alone)
  assert_close(both[1], alone[0], SAMPLE)
  assert differ(pipe(B, seed=4, **PLAIN).images, alone)


def test_the_same_call_is_bit_equal(pipe):
  run = lambda: pipe([A, B], image=LOW, seed=3, **PLAIN).images
  np.testing.assert_array_equal(run(), run())


def test_output_types(pipe):
  run = lambda kind: pipe([A, B], **(PLAIN | dict(output_type=kind))).images
  latents, array, images = run("latent"), run("np"), run("pil")
  assert latents.shape == (2, *LATENT) and latents.dtype == np.float32
  assert array.shape == (2, 32, 64, 3) and array.dtype == np.float32 and array.min() >= 0 and array.max() <= 1
  assert [(image.size, image.mode) for image in images] == [((64, 32), "RGB")] * 2
  decoded = np.asarray(pipe.decode_latents(latents))
  assert_close(array, np.clip((decoded + 1) / 2, 0, 1), BATCH)
  np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), np.round(array * 255).astype(np.uint8))
  with pytest.raises(UserError, match="output_type 'jpeg'"):
    pipe(A, output_type="jpeg")


def test_forms_of_the_image_argument(pipe, tmp_path):
  file = tmp_path / "in.png"
  Image.fromarray(LOW).save(file)
  expected = pipe(A, image=LOW, **PLAIN).images
  for image in (Image.fromarray(LOW), file, str(file), [LOW], [[file]]):
    np.testing.assert_array_equal(pipe(A, image=image, **PLAIN).images, expected)
  two = pipe(A, image=[LOW, TALL], **PLAIN).images  # several references of the one prompt
  assert two.shape == expected.shape and differ(two, expected)
  np.testing.assert_array_equal(pipe([A], image=[[LOW, TALL]], **PLAIN).images, two)
  assert differ(pipe(A, image=[TALL, LOW], **PLAIN).images, two)  # the prompt sees them in order
  shared = pipe([A, B], image=LOW, **PLAIN).images  # one reference for every prompt
  np.testing.assert_array_equal(pipe([A, B], image=[[LOW], [LOW]], **PLAIN).images, shared)
  ragged = pipe([A, B], image=[[LOW, TALL], []], **PLAIN).images
  assert_close(ragged[0], two[0], SAMPLE)
  assert_close(ragged[1], pipe(B, seed=1, **PLAIN).images[0], SAMPLE)


def test_wrong_image_arguments(pipe, tmp_path):
  for image in ([LOW, TALL], [[LOW]], [[LOW], LOW]):
    with pytest.raises(UserError, match="list of lists"):
      pipe([A, B], image=image, **PLAIN)
  with pytest.raises(UserError, match=r"no\.png does not exist"):
    pipe(A, image=tmp_path / "no.png", **PLAIN)
  with pytest.raises(UserError, match="uint8"):
    pipe(A, image=LOW / 255.0, **PLAIN)


def test_output_sizes(pipe):
  """Without a size: the first reference's after `fix_pixels` at the model's image_size, else the model's own."""
  quick = dict(num_inference_steps=2, guidance_scale=1.0)
  first = random_image(30, 60)  # 64x96 at 64
  images = pipe([A, B], image=[[first, LOW], []], **quick).images
  assert [image.size for image in images] == [(96, 64), (64, 64)]
  alone = np.asarray(pipe(B, seed=1, **quick).images[0], int)
  assert np.abs(np.asarray(images[1], int) - alone).max() <= 1
  with pytest.raises(UserError, match="different sizes"):
    pipe([A, B], image=[[first], []], output_type="np", **quick)


@pytest.mark.parametrize(
  "size, message",
  [
    (dict(height=64), "both height and width"),
    (dict(width=64), "both height and width"),
    (dict(height=40, width=64), "multiples of 16"),
    (dict(height=64, width=72), "multiples of 16"),
    (dict(height=0, width=64), "from 16"),
    (dict(height=-16, width=64), "from 16"),
    (dict(height=64, width=208), "to 192"),  # the position table has 12 rows
  ],
)
def test_wrong_sizes(pipe, size, message):
  with pytest.raises(UserError, match=message):
    pipe(A, **size)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(prompt=[]), "0 prompts"),
    (dict(negative_prompt=["", ""]), "2 negative prompts"),
    (dict(num_inference_steps=0), "num_inference_steps is 0"),
    (dict(latents=np.zeros((1, 4, 4, 8), np.float32)), r"needs \[1, 4, 8, 16\]"),
  ],
)
def test_other_wrong_arguments(pipe, options, message):
  with pytest.raises(UserError, match=message):
    pipe(**(dict(prompt=A) | PLAIN | options))


def euler(velocity, noise):
  """Two Euler steps on the scheduler's grid, written out."""
  x = noise
  for sigma, sigma_next in itertools.pairwise(inference_sigmas(CONFIG.scheduler, 2)):
    x = x + (sigma_next - sigma) * np.asarray(velocity(x, 1000 * sigma))
  return x


def test_without_guidance_one_branch_runs(pipe):
  noise, cond = draw(1, *LATENT), pipe.encode_prompt([A])
  expected = euler(lambda x, t: pipe.velocity(x, [t], cond), noise)
  out = pipe(A, negative_prompt="ignored", latents=noise, **PLAIN).images
  assert_close(out, expected, SAMPLE)
  for options in (PLAIN, PLAIN | dict(guidance_scale=0.0)):
    np.testing.assert_array_equal(pipe(A, latents=noise, **options).images, out)


def test_guidance_of_an_edit(pipe):
  """v = v_negative + g (v - v_negative); both branches see the same references, in the prompt and as latents."""
  noise, images = draw(1, *LATENT), [LOW, TALL]
  cond, negative = pipe.encode_prompt([A], [images]), pipe.encode_prompt(["dull"], [images])
  latents = [[pipe.encode_image(x) for x in images]]

  def velocity(x, timestep):
    v, against = (np.asarray(pipe.velocity(x, [timestep], c, latents)) for c in (cond, negative))
    return against + 3.0 * (v - against)

  out = pipe(A, image=images, negative_prompt="dull", latents=noise, **GUIDED).images
  assert_close(out, euler(velocity, noise), SAMPLE)
  assert differ(pipe(A, image=images, latents=noise, **GUIDED).images, out)


def test_an_overlong_prompt_is_cut_with_a_warning(pipe):
  """At 1024 tokens; the template stays, so two texts that differ past the cut are the same prompt."""
  with pytest.warns(UserWarning, match="too long"):
    long = pipe.encode_prompt(["x" * 1020 + "y"])
  assert long.mask.sum() == 1024 + CONFIG.scb.num_think_tokens
  with pytest.warns(UserWarning, match="too long"):
    np.testing.assert_array_equal(pipe.encode_prompt(["x" * 1020 + "zz"]).context, long.context)


def test_save_and_load_is_bit_equal(pipe, tmp_path):
  pipe.save_pretrained(tmp_path / "model")
  loaded = deepgen_jax.DeepGenPipeline.from_pretrained(tmp_path / "model")
  assert loaded.config == CONFIG
  assert jax.tree.structure(loaded.params) == jax.tree.structure(pipe.params)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, pipe.params)
  for x, y in zip(jax.tree.leaves(loaded.encode_prompt([A])), jax.tree.leaves(pipe.encode_prompt([A]))):
    np.testing.assert_array_equal(x, y)


def test_a_model_without_an_scb_is_refused(params, tmp_path):
  small.save_model(tmp_path, params, ("vlm", "dit", "vae"), CONFIG)
  with pytest.raises(UserError, match=r"lacks scb.*configs/align\.py"):
    deepgen_jax.DeepGenPipeline.from_pretrained(tmp_path)


def test_what_is_no_model_is_refused(tmp_path):
  with pytest.raises(UserError, match="no such folder"):
    deepgen_jax.DeepGenPipeline.from_pretrained(tmp_path / "nothing")
  with pytest.raises(UserError, match="neither a model directory"):
    deepgen_jax.DeepGenPipeline.from_pretrained(tmp_path)


def test_dtype_and_mesh(pipe, params):
  """Computing in bfloat16, on two devices that share the parameters: a velocity stays float32, and near."""
  mesh = sharding.make_mesh({"data": 1, "fsdp": 2}, jax.devices()[:2])
  latents, prompts = draw(2, *LATENT), ["", A]
  expected = pipe.velocity(latents, [900, 20.5], pipe.encode_prompt(prompts))
  other = deepgen_jax.DeepGenPipeline(CONFIG, params, pipe.tokenizer, dtype="bfloat16", mesh=mesh)
  out = other.velocity(latents, [900, 20.5], other.encode_prompt(prompts))
  assert out.dtype == np.float32
  assert_close(out, expected, 3e-2)
