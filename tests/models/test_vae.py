"""The VAE against diffusers' AutoencoderKL."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from deepgen_jax.models.config import VAEConfig  # noqa: E402
from deepgen_jax.models.vae import VAE, scale_latents, unscale_latents  # noqa: E402
from deepgen_jax.weights.names import vae_table  # noqa: E402
from deepgen_jax.weights.torch_format import from_torch, to_torch  # noqa: E402
from tests.models import oracle  # noqa: E402

CONFIG = VAEConfig(latent_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
MODEL = VAE(CONFIG)


@pytest.fixture(scope="module")
def vae():
  model = diffusers.AutoencoderKL(
    block_out_channels=CONFIG.block_out_channels,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=CONFIG.layers_per_block,
    norm_num_groups=CONFIG.norm_num_groups,
    latent_channels=CONFIG.latent_channels,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )
  oracle.randomise(model)
  with torch.no_grad():
    model.encoder.conv_out.bias[-1] = 30.0  # beyond the log-variance's upper limit
    model.encoder.conv_out.bias[-2] = -40.0
  return model


@pytest.fixture(scope="module")
def params(vae):
  abstract = oracle.abstract_init(MODEL, jnp.zeros((1, 8, 8, 3)))
  return from_torch(vae_table(CONFIG), oracle.numpy_state(vae), abstract)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(1).uniform(-1, 1, (2, 20, 28, 3)).astype(np.float32)  # 5 x 7 latents


def to_nchw(x):
  return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def to_nhwc(x):
  return x.permute(0, 2, 3, 1)


@functools.partial(jax.jit, static_argnums=0)
def apply(method, params, x):
  return MODEL.apply({"params": params}, x, method=method)


def test_encode_decode(vae, params, images):
  with torch.no_grad():
    posterior = vae.encode(to_nchw(images)).latent_dist
    decoded = vae.decode(posterior.mean).sample
  mean, logvar = apply("encode", params, images)
  assert mean.shape == (2, 5, 7, 4)
  oracle.assert_close(mean, to_nhwc(posterior.mean))
  oracle.assert_close(logvar, to_nhwc(posterior.logvar))
  assert logvar.max() == 20 and logvar.min() == -30
  out = apply("decode", params, to_nhwc(posterior.mean).numpy())
  oracle.assert_close(out, to_nhwc(decoded))


def test_gradients(vae, params, images):
  def loss(params, x):
    mean, logvar = MODEL.apply({"params": params}, x, method="encode")
    out = MODEL.apply({"params": params}, mean, method="decode")
    return jnp.square(out).mean() + jnp.sin(logvar[..., 0]).mean()

  x = to_nchw(images).requires_grad_()
  vae.zero_grad()
  posterior = vae.encode(x).latent_dist
  (vae.decode(posterior.mean).sample.square().mean() + posterior.logvar[:, 0].sin().mean()).backward()
  by_params, by_images = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, images)
  oracle.assert_gradients_close(by_params, oracle.torch_gradients(vae, vae_table(CONFIG), params))
  oracle.assert_close(by_images, to_nhwc(x.grad), oracle.GRADIENT)


def test_bfloat16(vae, params, images):
  z = np.random.default_rng(2).normal(size=(1, 3, 2, 4)).astype(np.float32)
  with torch.no_grad():
    reference = vae.decode(to_nchw(z)).sample
  ours = apply("decode", params, jnp.asarray(z, jnp.bfloat16))
  assert ours.dtype == jnp.float32  # whatever it computed in
  run = lambda m: m.decode(to_nchw(z).to(torch.bfloat16)).sample
  oracle.assert_bfloat16_close(ours.transpose(0, 3, 1, 2).astype(jnp.bfloat16), run, vae, reference)


def test_names_go_both_ways(vae, params):
  theirs, ours = oracle.numpy_state(vae), to_torch(vae_table(CONFIG), params)
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_scaling():
  config = VAEConfig()
  z = np.array([-1.0, 0.0609, 3.0])
  np.testing.assert_allclose(scale_latents(z, config), (z - 0.0609) * 1.5305)
  np.testing.assert_allclose(unscale_latents(scale_latents(z, config), config), z)
