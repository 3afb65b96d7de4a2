"""SD3 autoencoder: images [B,H,W,3] in [-1,1] <-> latents [B,H/8,W/8,16] (the factor and channels come from the config).

Follows diffusers' AutoencoderKL as SD3 configures it: no quant convolutions, mean and log-variance from the encoder, one
attention head in the middle. Everything computes in the dtype of its input, group norm statistics in float32.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.models.config import VAEConfig
from deepgen_jax.models.layers import Linear, attention
from deepgen_jax.sharding import keep_dealt

LOGVAR_RANGE = (-30.0, 20.0)


def scale_latents(latents: Array, config: VAEConfig) -> Array:
  """VAE latents -> the scaled latents that the DiT sees."""
  return (latents - config.shift_factor) * config.scaling_factor


def unscale_latents(latents: Array, config: VAEConfig) -> Array:
  """Inverse of `scale_latents`."""
  return latents / config.scaling_factor + config.shift_factor


def group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float = 1e-6) -> Array:
  """GroupNorm over rows, columns and the channels of a group; x [B,H,W,C], statistics in float32, result in the dtype of x."""
  batch, height, width, channels = x.shape
  y = x.astype(jnp.float32).reshape(batch, height * width, groups, channels // groups)
  mean = y.mean((1, 3), keepdims=True)
  variance = jnp.square(y - mean).mean((1, 3), keepdims=True)
  grouped = (1, 1, groups, channels // groups)
  y = (y - mean) * (jax.lax.rsqrt(variance + eps) * scale.reshape(grouped)) + bias.reshape(grouped)
  return y.reshape(x.shape).astype(x.dtype)


class GroupNorm(nn.Module):
  """`group_norm` with learned `scale` and `bias`."""

  groups: int

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    return group_norm(x, scale, bias, self.groups)


class Conv(nn.Module):
  """Square convolution with bias; `kernel` [size, size, in, out]. Keeps the resolution unless told a stride and padding."""

  features: int
  size: int = 3
  stride: int = 1
  padding: tuple[int, int] | None = None  # before and after, on both sides; default: as many as keep the resolution

  @nn.compact
  def __call__(self, x):
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    padding = self.padding or (self.size // 2, self.size // 2)
    y = jax.lax.conv_general_dilated(
      x,
      kernel.astype(x.dtype),
      window_strides=(self.stride, self.stride),
      padding=(padding, padding),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return keep_dealt(y + bias.astype(x.dtype))


class ResBlock(nn.Module):
  """Two normalised convolutions around a shortcut; [B,H,W,C] -> [B,H,W,features]."""

  features: int
  groups: int

  @nn.compact
  def __call__(self, x):
    h = Conv(self.features, name="conv1")(jax.nn.silu(GroupNorm(self.groups, name="norm1")(x)))
    h = Conv(self.features, name="conv2")(jax.nn.silu(GroupNorm(self.groups, name="norm2")(h)))
    if x.shape[-1] != self.features:
      x = Conv(self.features, size=1, name="shortcut")(x)
    return x + h


class MidBlock(nn.Module):
  """Residual block, attention of one head over all pixels, residual block."""

  groups: int

  @nn.compact
  def __call__(self, x):
    shape = x.shape
    channels = shape[-1]
    x = ResBlock(channels, self.groups, name="res_0")(x)
    h = GroupNorm(self.groups, name="norm")(x).reshape(shape[0], -1, channels)
    q, k, v = (Linear(channels, name=n)(h)[:, :, None] for n in ("q", "k", "v"))
    h = Linear(channels, name="out")(attention(q, k, v)[:, :, 0])
    x = x + h.reshape(shape)
    return ResBlock(channels, self.groups, name="res_1")(x)


class DownBlock(nn.Module):
  """Residual blocks, then half the resolution."""

  features: int
  layers: int
  groups: int
  downsample: bool

  @nn.compact
  def __call__(self, x):
    for i in range(self.layers):
      x = ResBlock(self.features, self.groups, name=f"res_{i}")(x)
    if self.downsample:  # pads at the bottom and on the right alone
      x = Conv(self.features, stride=2, padding=(0, 1), name="downsample")(x)
    return x


class UpBlock(nn.Module):
  """Residual blocks, then twice the resolution."""

  features: int
  layers: int
  groups: int
  upsample: bool

  @nn.compact
  def __call__(self, x):
    for i in range(self.layers):
      x = ResBlock(self.features, self.groups, name=f"res_{i}")(x)
    if self.upsample:
      x = Conv(self.features, name="upsample")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
    return x


class Encoder(nn.Module):
  """Images -> posterior moments."""

  config: VAEConfig

  @nn.compact
  def __call__(self, images):
    """[B,H,W,3] -> mean and log-variance side by side, [B,h,w,2*latent_channels]."""
    c = self.config
    widths = c.block_out_channels
    x = Conv(widths[0], name="conv_in")(images)
    for i, width in enumerate(widths):
      x = DownBlock(width, c.layers_per_block, c.norm_num_groups, i < len(widths) - 1, name=f"down_{i}")(x)
    x = MidBlock(c.norm_num_groups, name="mid")(x)
    x = jax.nn.silu(GroupNorm(c.norm_num_groups, name="norm_out")(x))
    return Conv(2 * c.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
  """Latents -> images."""

  config: VAEConfig

  @nn.compact
  def __call__(self, latents):
    """[B,h,w,latent_channels] -> [B,H,W,3]."""
    c = self.config
    widths = c.block_out_channels[::-1]
    x = Conv(widths[0], name="conv_in")(latents)
    x = MidBlock(c.norm_num_groups, name="mid")(x)
    for i, width in enumerate(widths):
      x = UpBlock(width, c.layers_per_block + 1, c.norm_num_groups, i < len(widths) - 1, name=f"up_{i}")(x)
    x = jax.nn.silu(GroupNorm(c.norm_num_groups, name="norm_out")(x))
    return Conv(c.in_channels, name="conv_out")(x)


class VAE(nn.Module):
  """Latents here are the VAE's own; `scale_latents` and `unscale_latents` go to and from what the DiT sees."""

  config: VAEConfig

  def setup(self):
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config)

  def encode(self, images: Array) -> tuple[Array, Array]:
    """images [B,H,W,3] in [-1,1], sides multiples of config.factor -> mean, log-variance, each [B,h,w,latent_channels]."""
    mean, logvar = jnp.split(self.encoder(images), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def decode(self, latents: Array) -> Array:
    """Unscaled latents [B,h,w,latent_channels] -> images float32 [B,H,W,3], nominally in [-1,1], not clipped."""
    return self.decoder(latents).astype(jnp.float32)

  def __call__(self, images: Array) -> Array:
    """Encodes and decodes the posterior's mode; what initialisation runs."""
    return self.decode(self.encode(images)[0])
