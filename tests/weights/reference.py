"""A tiny DeepGen of the stock PyTorch libraries' modules: it writes its folder in the diffusers format, and runs as an oracle.

The oracle takes one sample at a time, without padding, and shares no code with the package: the templates, patches, positions,
sampling and guidance are those of the libraries or are written out here.
"""

import copy
import dataclasses
import json

import diffusers
import torch
import transformers
from safetensors.torch import save_file

from deepgen_jax.data.tokens import build_tiny_tokenizer
from tests import small
from tests.models import oracle
from tests.models.test_scb import Oracle

# The smallest depth of which the reference's rule reads six layers.
CONFIG = dataclasses.replace(
  small.VARIED,
  text=dataclasses.replace(small.VARIED.text, num_layers=32),
  scb=dataclasses.replace(small.VARIED.scb, read_layers=(31, 25, 19, 13, 7, 1)),
  image_size=512,  # the format doesn't say; the release's
)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Connector(Oracle):
  """The SCB of `CONFIG`, under the names of the released connector."""

  def __init__(self, config):
    super().__init__(config)
    self.projector_1 = torch.nn.Linear(len(config.scb.read_layers) * config.text.hidden_size, config.scb.hidden_size)


def build_vlm(config, tokenizer):
  text, vision = config.text, config.vision
  token = tokenizer.convert_tokens_to_ids
  return transformers.Qwen2_5_VLForConditionalGeneration(
    transformers.Qwen2_5_VLConfig(
      text_config=dict(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        intermediate_size=text.intermediate_size,
        rms_norm_eps=text.rms_eps,
        rope_parameters=dict(rope_type="default", rope_theta=text.rope_theta, mrope_section=list(text.mrope_section)),
        bos_token_id=0,
        eos_token_id=0,
      ),
      vision_config=dict(
        depth=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_heads=vision.num_heads,
        intermediate_size=vision.intermediate_size,
        out_hidden_size=vision.out_size,
        window_size=vision.window_size,
        fullatt_block_indexes=list(vision.full_attention_layers),
      ),
      tie_word_embeddings=True,
      image_token_id=token("<|image_pad|>"),
      video_token_id=token("<|video_pad|>"),
      vision_start_token_id=token("<|vision_start|>"),
    )
  )


def build_dit(c):
  return diffusers.SD3Transformer2DModel(
    sample_size=c.sample_size,
    patch_size=c.patch_size,
    in_channels=c.in_channels,
    out_channels=c.in_channels,
    num_layers=c.num_layers,
    attention_head_dim=c.head_dim,
    num_attention_heads=c.num_heads,
    joint_attention_dim=c.context_size,
    caption_projection_dim=c.hidden_size,
    pooled_projection_dim=c.pooled_size,
    pos_embed_max_size=c.pos_embed_max_size,
    dual_attention_layers=c.dual_attention_layers,
    qk_norm="rms_norm",
  )


def build_vae(c):
  return diffusers.AutoencoderKL(
    block_out_channels=c.block_out_channels,
    down_block_types=("DownEncoderBlock2D",) * len(c.block_out_channels),
    up_block_types=("UpDecoderBlock2D",) * len(c.block_out_channels),
    layers_per_block=c.layers_per_block,
    norm_num_groups=c.norm_num_groups,
    latent_channels=c.latent_channels,
    scaling_factor=c.scaling_factor,
    shift_factor=c.shift_factor,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )


class Reference:
  """The modules with random weights of ordinary size, composed as the PyTorch reference composes them."""

  def __init__(self, config=CONFIG):
    self.config, self.tokenizer = config, build_tiny_tokenizer()
    modules = build_vlm(config, self.tokenizer), Connector(config), build_dit(config.dit), build_vae(config.vae)
    self.vlm, self.connector, self.dit, self.vae = (oracle.randomise(module, seed) for seed, module in enumerate(modules))
    self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=config.scheduler.shift)

  def save(self, folder, dtype=torch.float32, **options):
    """Writes the folder with the libraries' own save_pretrained and its options for VLM and DiT; `dtype` is the stored one."""
    vlm, connector, dit, vae = (copy.deepcopy(m).to(dtype) for m in (self.vlm, self.connector, self.dit, self.vae))
    vlm.save_pretrained(folder / "vlm", **options)
    dit.save_pretrained(folder / "transformer", **options)
    vae.save_pretrained(folder / "vae")
    self.scheduler.save_pretrained(folder / "scheduler")
    self.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "connector").mkdir()
    save_file(connector.state_dict(), folder / "connector" / "model.safetensors")
    sizes = self.config.scb
    connector_config = dict(
      hidden_size=sizes.hidden_size,
      intermediate_size=sizes.intermediate_size,
      num_hidden_layers=sizes.num_layers,
      num_attention_heads=sizes.num_heads,
      hidden_act="gelu_pytorch_tanh",
    )
    (folder / "connector" / "config.json").write_text(json.dumps({"connector": connector_config}))
    index = dict(
      _class_name=["deepgen_pipeline", "DeepGenPipeline"],
      _diffusers_version=diffusers.__version__,
      transformer=["diffusers", "SD3Transformer2DModel"],
      vae=["diffusers", "AutoencoderKL"],
      scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
    )
    (folder / "model_index.json").write_text(json.dumps(index))

  @torch.no_grad()
  def condition(self, text, images=()):
    """Prompt, and references uint8 [H,W,3] -> pooled [P], context [T,D]; T counts the prompt's and the think tokens."""
    pads = [image.shape[0] * image.shape[1] // 32**2 for image in images]
    seen = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in pads)
    content = f"{seen}\n{text}" if pads else f"Generate an image: {text}"
    template = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([self.tokenizer(template)["input_ids"]])
    is_image = ids == self.vlm.config.image_token_id
    embedded = self.vlm.model.language_model.embed_tokens(ids)
    grids = [[1, image.shape[0] // 16, image.shape[1] // 16] for image in images]
    if pads:
      towered = [self.vlm.model.visual(_patches(x), grid_thw=torch.tensor([g])).pooler_output for x, g in zip(images, grids)]
      embedded[is_image] = torch.cat(towered)
    think = self.connector.meta_queries[None]
    ids, is_image = (torch.cat([x, x.new_zeros(think.shape[:2])], dim=1) for x in (ids, is_image))
    mask = torch.ones_like(ids)
    grids = torch.tensor(grids) if pads else None
    places, _ = self.vlm.model.get_rope_index(ids, is_image.int(), image_grid_thw=grids, attention_mask=mask)
    hidden = self.vlm.model.language_model(
      inputs_embeds=torch.cat([embedded, think], dim=1),
      attention_mask=mask,
      position_ids=places,
      output_hidden_states=True,
      use_cache=False,
    ).hidden_states
    return self.connector(torch.cat([hidden[layer][0] for layer in self.config.scb.read_layers], dim=-1))

  @torch.no_grad()
  def encode(self, image):
    """uint8 [H,W,3] -> scaled latent [h,w,c], the posterior's mode."""
    x = torch.tensor(image).float().permute(2, 0, 1)[None] / 127.5 - 1
    mode = self.vae.encode(x).latent_dist.mode()[0].permute(1, 2, 0)
    return (mode - self.vae.config.shift_factor) * self.vae.config.scaling_factor

  @torch.no_grad()
  def decode(self, latent):
    """Scaled latent [h,w,c] -> the decoder's own output [H,W,3]."""
    x = latent / self.vae.config.scaling_factor + self.vae.config.shift_factor
    return self.vae.decode(x.permute(2, 0, 1)[None]).sample[0].permute(1, 2, 0)

  @torch.no_grad()
  def velocity(self, latent, timestep, conditioning, references=()):
    """Latents [h,w,c] -> [h,w,c]. Each is embedded with its own centre crop of the position table; references follow."""
    model, (pooled, context) = self.dit, conditioning
    x = torch.cat([model.pos_embed(z.permute(2, 0, 1)[None]) for z in (latent, *references)], dim=1)
    temb = model.time_text_embed(torch.as_tensor(timestep)[None], pooled[None])
    c = model.context_embedder(context[None])
    for block in model.transformer_blocks:
      c, x = block(hidden_states=x, encoder_hidden_states=c, temb=temb)
    height, width, channels = latent.shape
    tokens = model.proj_out(model.norm_out(x[:, : height * width // 4], temb))
    return tokens.reshape(height // 2, width // 2, 2, 2, channels).transpose(1, 2).reshape(height, width, channels)

  def sample(self, noise, positive, negative, references=(), steps=6, guidance=4.0, **shift):
    """Noise [h,w,c] -> scaled latents [h,w,c] by diffusers' scheduler, with classifier-free guidance. shift: mu, if dynamic."""
    x = noise
    self.scheduler.set_timesteps(steps, **shift)
    for timestep in self.scheduler.timesteps:
      v_negative, v = (self.velocity(x, timestep, conditioning, references) for conditioning in (negative, positive))
      x = self.scheduler.step(v_negative + guidance * (v - v_negative), timestep, x).prev_sample
    return x


def _patches(image):
  """uint8 [H,W,3] -> [H/16 * W/16, 3*2*14*14], in the order and layout of the library's image processor."""
  x = torch.tensor(image).permute(2, 0, 1)[None].float() / 127.5 - 1
  x = torch.nn.functional.interpolate(x, scale_factor=28 / 32, mode="bilinear", align_corners=False)[0]
  x = ((x + 1) / 2 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
  rows, columns = image.shape[0] // 32, image.shape[1] // 32
  x = x.reshape(3, rows, 2, 14, columns, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)  # cell (2), patch of it (2), channel, pixel (2)
  return x[:, :, :, :, :, None].expand(*x.shape[:5], 2, 14, 14).reshape(rows * columns * 4, -1)
