"""`convert`: what the stock libraries, peft and torch.save wrote comes in and goes out again; LoRA is merged as peft does."""

import copy
import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import transformers  # noqa: E402

from deepgen_jax.convert import convert, inspect  # noqa: E402
from deepgen_jax.errors import UserError  # noqa: E402
from deepgen_jax.models.lora import LoraKernel  # noqa: E402
from deepgen_jax.pipeline import DeepGenPipeline  # noqa: E402
from deepgen_jax.weights import diffusers as layout  # noqa: E402
from deepgen_jax.weights import tensors as files  # noqa: E402
from deepgen_jax.weights.load import load_model, open_weights  # noqa: E402
from tests.models import oracle  # noqa: E402
from tests.small import random_image  # noqa: E402
from tests.weights.reference import CONFIG, Reference  # noqa: E402

RANK, ALPHA = 3, 6


@pytest.fixture(scope="module")
def reference():
  return Reference()


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory):
  """Written by the libraries: a whole DeepGen, and the two that stage 1 starts from."""
  root = tmp_path_factory.mktemp("folders")
  reference.save(root / "deepgen")
  qwen, sd3 = root / "qwen", root / "sd3"
  reference.vlm.save_pretrained(qwen, max_shard_size="100KB")
  reference.tokenizer.save_pretrained(qwen)
  for part, module in (("transformer", reference.dit), ("vae", reference.vae), ("scheduler", reference.scheduler)):
    module.save_pretrained(sd3 / part)
  (sd3 / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
  (sd3 / "text_encoder").mkdir()  # its own text encoders are of no use here
  (sd3 / "tokenizer").mkdir()
  return root


@pytest.fixture(scope="module")
def adapted(reference):
  """The VLM under a LoRA on every linear and embedding, vision tower and head included, as the reference puts it."""
  vlm = copy.deepcopy(reference.vlm)
  vlm.config.tie_word_embeddings = vlm.config.text_config.tie_word_embeddings = False
  vlm.lm_head.weight = torch.nn.Parameter(vlm.lm_head.weight.detach().clone())
  kinds = torch.nn.Linear, torch.nn.Embedding
  names = [name for name, module in vlm.named_modules() if isinstance(module, kinds)]
  return oracle_lora(vlm, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))


def oracle_lora(vlm, config):
  """peft's model with random factors; `.merged` is what peft makes of it."""
  model = peft.get_peft_model(vlm, config)
  generator = torch.Generator().manual_seed(5)
  for name, parameter in model.named_parameters():
    if "lora_" in name:
      parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
  merged = copy.deepcopy(model).merge_and_unload()
  return model, merged


@pytest.fixture(scope="module")
def checkpoint(reference, adapted):
  """What a stage 2 or 3 run of the reference holds after consolidation."""
  state = {**reference.connector.state_dict(), **{f"transformer.{k}": v for k, v in reference.dit.state_dict().items()}}
  for name, tensor in adapted[0].base_model.model.state_dict().items():
    if "lora_" in name:
      state[f"lmm.{name}"] = tensor
  assert sum("lora_" in name for name in state) == 2 * (CONFIG.vision.num_layers * 5 + 2 + CONFIG.text.num_layers * 7 + 2)
  return state


def flat(weights):
  """{PART/PATH: values}."""
  return {f"{part}/{path}": t.read() for part, tree in weights.leaves.items() for path, t in tree.items()}


def assert_same(ours, expected):
  assert ours.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)


def vlm_state(path):
  """A written VLM as transformers reads it."""
  model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  return model.state_dict()


def close(state, expected):
  assert state.keys() == expected.keys()
  for name, tensor in expected.items():
    oracle.assert_close(state[name].float().numpy(), tensor.detach().float(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_and_out_again_is_bit_equal(reference, tmp_path, dtype):
  """Diffusers folder -> model directory -> diffusers folder that the stock libraries load."""
  reference.save(tmp_path / "in", dtype=dtype)
  first = open_weights(tmp_path / "in")
  convert(first, tmp_path / "ours")
  second = open_weights(tmp_path / "ours")
  assert second.config == first.config == CONFIG
  assert_same(flat(second), flat(first))
  stored = np.dtype(ml_dtypes.bfloat16) if dtype == torch.bfloat16 else np.dtype(np.float32)
  assert {tensor.dtype for tree in second.leaves.values() for tensor in tree.values()} == {stored}
  convert(second, tmp_path / "out", to="diffusers")
  third = open_weights(tmp_path / "out")
  assert third.config == CONFIG
  assert_same(flat(third), flat(first))
  kinds = {"transformer": diffusers.SD3Transformer2DModel, "vae": diffusers.AutoencoderKL}
  for part, module in (("transformer", reference.dit), ("vae", reference.vae)):
    model, report = kinds[part].from_pretrained(tmp_path / "out" / part, torch_dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in copy.deepcopy(module).to(dtype).state_dict().items():
      if name == "pos_embed.pos_embed":  # computed
        oracle.assert_close(model.state_dict()[name].float(), tensor.float(), 1e-2 if dtype == torch.bfloat16 else 1e-5)
      else:
        assert torch.equal(model.state_dict()[name], tensor), name
  close(vlm_state(tmp_path / "out" / "vlm"), copy.deepcopy(reference.vlm).to(dtype).state_dict())
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
  assert scheduler.config.shift == 3.0 and torch.equal(scheduler.sigmas, reference.scheduler.sigmas)
  connector = files.open_file(tmp_path / "out" / "connector" / "model.safetensors")
  assert connector.keys() == reference.connector.state_dict().keys()
  for file in (tmp_path / "in" / "tokenizer").iterdir():
    assert (tmp_path / "out" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
  text = "<|im_start|>user\nGenerate an image: a cat<|im_end|>"
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
  assert tokenizer(text)["input_ids"] == reference.tokenizer(text)["input_ids"]


def test_two_bases_for_a_fresh_stage_one(folders, tmp_path):
  whole = flat(open_weights(folders / "deepgen"))
  for order in (["qwen", "sd3"], ["sd3", "qwen"]):
    opened = open_weights(folders / order[0], folders / order[1])
    assert_same(flat(opened), {name: value for name, value in whole.items() if not name.startswith("scb/")})
    assert opened.config.text == CONFIG.text and opened.config.scb.read_layers == CONFIG.scb.read_layers
  convert(opened, tmp_path / "base")
  assert_same(flat(open_weights(tmp_path / "base")), flat(opened))
  command = [sys.executable, "-m", "deepgen_jax.convert", "--source", folders / "qwen", "--target", tmp_path / "half"]
  done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
  assert done.returncode == 2 and "Missing: the DiT and the VAE" in done.stderr and "Traceback" not in done.stderr
  assert not (tmp_path / "half").exists()


SPELLINGS = {
  "plain": lambda state: state,
  "wrapped, module.": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "meta": {"iter": 7}},
  "module.model.": lambda state: {f"module.model.{k}": v for k, v in state.items()},
  "model., old hierarchy": lambda state: {
    "model." + k.replace("lmm.model.visual.", "lmm.visual.").replace("lmm.model.language_model.", "lmm.model."): v
    for k, v in state.items()
  },
  "no adapter name": lambda state: {k.replace(".default", ""): v for k, v in state.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_checkpoint_with_lora_merged(folders, checkpoint, reference, adapted, tmp_path, spelling):
  torch.save(SPELLINGS[spelling](checkpoint), tmp_path / "model.pt")
  weights = open_weights(tmp_path / "model.pt", [folders / "qwen", folders / "sd3"])
  assert (len(weights.factors) == CONFIG.vision.num_layers and False) or weights.factors
  convert(weights, tmp_path / "out", to="diffusers")
  assert json.loads((tmp_path / "out" / "vlm" / "config.json").read_text())["tie_word_embeddings"] is False
  close(vlm_state(tmp_path / "out" / "vlm"), adapted[1].state_dict())
  whole = flat(open_weights(folders / "deepgen"))
  ours = flat(open_weights(tmp_path / "out"))
  assert_same(*({n: v for n, v in f.items() if not n.startswith("vlm/")} for f in (ours, whole)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint(folders, checkpoint, adapted, tmp_path, dtype):
  """LoRA and SCB in half precision over a float32 base; the merge is computed in float32."""
  half = {name: tensor.to(dtype) for name, tensor in checkpoint.items()}
  torch.save(half, tmp_path / "model.pth")
  weights = open_weights(tmp_path / "model.pth", folders / "deepgen").merged()
  assert weights.leaves["scb"]["think_tokens"].dtype == (np.float16 if dtype == torch.float16 else ml_dtypes.bfloat16)
  expected = checkpoint["meta_queries"].to(dtype).float().numpy()
  np.testing.assert_array_equal(weights.leaves["scb"]["think_tokens"].read().astype(np.float32), expected)
  convert(weights, tmp_path / "out", to="diffusers")
  for name, tensor in adapted[1].state_dict().items():
    oracle.assert_close(vlm_leaf(tmp_path, name), tensor, 2e-3 if dtype == torch.float16 else 1e-2)


def vlm_leaf(folder, name):
  return files.open_files(folder / "out" / "vlm" / "model.safetensors")[name].read()


def test_alpha(folders, checkpoint, adapted, tmp_path):
  """Twice the rank is the default; with another the update scales."""
  torch.save(checkpoint, tmp_path / "model.pt")
  base = open_weights(folders / "deepgen").leaves["vlm"]["text/segments_0/q/kernel"].read()
  update = lambda alpha: (
    open_weights(tmp_path / "model.pt", folders / "deepgen", lora_alpha=alpha)
    .merged()
    .leaves["vlm"]["text/segments_0/q/kernel"]
    .read()
    - base
  )
  oracle.assert_close(update(None), torch.tensor(update(2 * RANK)), 1e-7)
  oracle.assert_close(2 * update(RANK), torch.tensor(update(None)), 1e-5)
  assert np.abs(update(None)).max() > 0.03


def test_lora_kept_and_handed_back(folders, checkpoint, adapted, tmp_path):
  """Checkpoint -> model directory with lora.safetensors -> folder and adapter that peft puts together again."""
  torch.save(checkpoint, tmp_path / "model.pt")
  convert(open_weights(tmp_path / "model.pt", folders / "deepgen"), tmp_path / "ours", keep_lora=True)
  kept = open_weights(tmp_path / "ours")
  assert len(kept.factors) == len(files.open_file(tmp_path / "ours" / "lora.safetensors")) / 2
  config, params, _ = load_model(tmp_path / "ours", parts=("vlm",))
  kernel = params["vlm"]["text"]["segments_0"]["q"]["kernel"]
  assert isinstance(kernel, LoraKernel) and kernel.a.shape == (1, 32, RANK) and kernel.scale == ALPHA / RANK
  assert isinstance(params["vlm"]["text"]["head"]["kernel"], LoraKernel) and not config.text.tie_word_embeddings
  assert_same(flat(kept.merged()), flat(open_weights(tmp_path / "model.pt", folders / "deepgen").merged()))
  convert(kept, tmp_path / "out", to="diffusers", keep_lora=True)
  vlm = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out" / "vlm")
  model = peft.PeftModel.from_pretrained(vlm, tmp_path / "out" / "lora" / "vlm")
  own = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
  theirs = {name: tensor for name, tensor in adapted[0].state_dict().items() if "lora_" in name}
  assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in theirs)
  close(model.merge_and_unload().state_dict(), adapted[1].state_dict())


ADAPTERS = {
  "all layers": dict(target_modules=["q_proj", "down_proj", "qkv"]),
  "some layers": dict(target_modules=["v_proj", "o_proj"], layers_to_transform=[1, 30]),
  "rank-stabilised": dict(target_modules=["gate_proj"], use_rslora=True),
  "patterns": dict(
    target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 5}, alpha_pattern={"layers.3.self_attn.q_proj": 1}
  ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_folder(folders, reference, tmp_path, kind):
  """Linears of the text model under LoRA alone: the head stays tied."""
  model, merged = oracle_lora(copy.deepcopy(reference.vlm), peft.LoraConfig(r=RANK, lora_alpha=7, **ADAPTERS[kind]))
  model.save_pretrained(tmp_path / "adapter")
  weights = open_weights(tmp_path / "adapter", folders / "deepgen")
  convert(weights, tmp_path / "out", to="diffusers")
  assert weights.config == CONFIG
  close(vlm_state(tmp_path / "out" / "vlm"), merged.state_dict())


def test_adapter_of_the_dit(folders, reference, tmp_path):
  dit = copy.deepcopy(reference.dit)
  model, merged = oracle_lora(dit, peft.LoraConfig(r=RANK, lora_alpha=4, target_modules=["to_q", "add_v_proj", "to_out.0"]))
  model.save_pretrained(tmp_path / "adapter")
  convert(open_weights(tmp_path / "adapter", folders / "deepgen"), tmp_path / "out", to="diffusers")
  ours = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
  close(ours.state_dict(), merged.state_dict())


def test_after_lora_the_conditioning_is_the_references(folders, checkpoint, reference, adapted, tmp_path):
  """Text and an image, through the merged decoder and the merged vision tower."""
  torch.save(checkpoint, tmp_path / "model.pt")
  pipe = DeepGenPipeline.from_pretrained(tmp_path / "model.pt", base=folders / "deepgen")  # which says how many heads
  merged = copy.copy(reference)
  merged.vlm = adapted[1]
  images, text = [random_image(32, 64)], "make the lamp brighter"
  pooled, context = merged.condition(text, images)
  ours = pipe.encode_prompt([text], [images])
  oracle.assert_close(ours.pooled[0], pooled)
  oracle.assert_close(np.asarray(ours.context)[0, np.asarray(ours.mask)[0]], context)
  assert oracle.relative_error(reference.condition(text, images)[1], context) > 0.05
  noise = np.random.default_rng(0).normal(size=(1, 4, 8, 16)).astype(np.float32)
  out = pipe(text, image=[images], height=32, width=64, num_inference_steps=6, latents=noise, output_type="np").images[0]
  latents = merged.sample(torch.tensor(noise[0]), (pooled, context), merged.condition("", images), [merged.encode(images[0])])
  oracle.assert_close(out, ((merged.decode(latents) + 1) / 2).clip(0, 1), 1e-3)
  pipe.save_pretrained(tmp_path / "out", format="diffusers")
  close(vlm_state(tmp_path / "out" / "vlm"), adapted[1].state_dict())


def test_stage_one_checkpoint(folders, reference, tmp_path):
  """SCB and think tokens, and of the DiT nothing but its position table."""
  state = {
    **reference.connector.state_dict(),
    "transformer.pos_embed.pos_embed": reference.dit.state_dict()["pos_embed.pos_embed"],
  }
  torch.save(state, tmp_path / "iter_200000.pth")
  opened = open_weights(tmp_path / "iter_200000.pth", [folders / "qwen", folders / "sd3"])
  ours, whole = flat(opened), flat(open_weights(folders / "deepgen"))
  assert_same(ours, whole)
  assert "stage: 1 " in inspect(tmp_path / "iter_200000.pth")
  state |= {key: value + 0.1 for key, value in state.items() if key.endswith("pos_embed.pos_embed")}
  torch.save(state, tmp_path / "other.pth")
  with pytest.raises(UserError, match=r"(?s)other\.pth: .*pos_embed.pos_embed: differs by up to 0\.1"):
    open_weights(tmp_path / "other.pth", [folders / "qwen", folders / "sd3"])


def test_a_model_directory_says_what_a_checkpoint_does_not(folders, checkpoint, tmp_path):
  """How many heads the SCB has, and which states it reads."""
  torch.save(checkpoint, tmp_path / "model.pt")
  convert(open_weights(folders / "deepgen"), tmp_path / "ours")
  assert open_weights(tmp_path / "model.pt", tmp_path / "ours").config.scb == CONFIG.scb


def test_a_damaged_adapter_config_is_named(folders, tmp_path):
  (tmp_path / "adapter_config.json").write_text("{")
  with pytest.raises(UserError, match=r"adapter_config\.json is no JSON"):
    open_weights(tmp_path, folders / "deepgen")


def change(name, value):
  def apply(state):
    state[name] = value

  return apply


def broken_json(folder, file, **values):
  old = json.loads((folder / file).read_text())
  (folder / file).write_text(json.dumps(old | values))


CHECKPOINT_MISTAKES = {
  "unknown part": (change("discriminator.weight", torch.zeros(1)), ["discriminator.weight", "no part of a DeepGen"]),
  "unknown key": (change("transformer.transformer_blocks.9.attn.to_q.weight", torch.zeros(2)), ["blocks.9", "unknown key"]),
  "missing": (lambda state: state.pop("projector_2.bias"), ["projector_2.bias: missing"]),
  "shape": (change("transformer.proj_out.bias", torch.zeros(3)), ["proj_out.bias: shape (3,), expected (64,)"]),
  "half of LoRA": (
    lambda state: state.pop("lmm.lm_head.lora_A.default.weight"),
    ["lm_head: lora_A is missing"],
  ),
  "LoRA on nothing": (
    lambda state: state.update({f"lmm.model.visual.hat.lora_{x}.default.weight": torch.zeros(1, 1) for x in "AB"}),
    ["model.visual.hat: unknown module"],
  ),
  "LoRA of another size": (
    change("lmm.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight", torch.zeros(RANK, 31)),
    ["layers.0.self_attn.q_proj", "(32, 31)", "(32, 32)"],
  ),
}


@pytest.mark.parametrize("mistake", CHECKPOINT_MISTAKES)
def test_a_mistake_in_a_checkpoint_is_named(folders, checkpoint, tmp_path, mistake):
  apply, words = CHECKPOINT_MISTAKES[mistake]
  state = dict(checkpoint)
  apply(state)
  torch.save(state, tmp_path / "model.pt")
  with pytest.raises(UserError) as error:
    open_weights(tmp_path / "model.pt", folders / "deepgen")
  for word in ["model.pt", *words]:
    assert word in str(error.value)


def test_wrong_architectures_are_named(folders, tmp_path):
  for part, values, words in (
    ("vlm", {"model_type": "qwen2_vl"}, "a qwen2_vl, not of a Qwen2.5-VL"),
    ("transformer", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel, not of a SD3Transformer2DModel"),
    ("vae", {"_class_name": "AutoencoderDC"}, "AutoencoderDC, not of a AutoencoderKL"),
    ("transformer", {"num_layers": 2}, "blocks.2"),
  ):
    folder = shutil.copytree(folders / "deepgen", tmp_path / f"{part}{len(words)}")
    broken_json(folder, f"{part}/config.json", **values)
    with pytest.raises(UserError, match=words):
      open_weights(folder)


def test_nan_leaves_nothing_behind(folders, checkpoint, tmp_path):
  state = checkpoint | {"meta_queries": torch.full_like(checkpoint["meta_queries"], float("nan"))}
  torch.save(state, tmp_path / "model.pt")
  with pytest.raises(UserError, match="think_tokens holds NaN"):
    convert(open_weights(tmp_path / "model.pt", folders / "deepgen"), tmp_path / "out")
  assert not (tmp_path / "out").exists()
  with pytest.raises(UserError, match="scb/think_tokens holds NaN"):
    load_model(tmp_path / "model.pt", folders / "deepgen")


def test_a_target_that_holds_something_is_left_alone(folders, tmp_path):
  (tmp_path / "mine.txt").write_text("precious")
  with pytest.raises(UserError, match="isn't empty"):
    convert(open_weights(folders / "deepgen"), tmp_path)
  assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_inspect(folders, checkpoint, tmp_path):
  torch.save(checkpoint, tmp_path / "model.pt")
  said = inspect(tmp_path / "model.pt")
  modules = CONFIG.vision.num_layers * 5 + 2 + CONFIG.text.num_layers * 7 + 2
  assert "stage: 2 or 3" in said and f"LoRA: {modules} modules, rank {RANK}" in said and "float32" in said
  assert "missing for a whole model: VLM, VAE" in said
  dit = sum(t.size for t in layout_tensors(folders, "dit").values())
  assert f"DiT: {len(layout_tensors(folders, 'dit'))} tensors, {dit:,} parameters" in inspect(folders / "sd3")
  assert "diffusers folder" in (whole := inspect(folders / "deepgen")) and "missing" not in whole
  assert "missing for a whole model: SCB and think tokens, DiT, VAE" in inspect(folders / "qwen")


def layout_tensors(folders, part):
  return files.open_files((folders / "deepgen").joinpath(*layout.FILES[part]))
