"""PyTorch's side of a case, in a process of its own (`torch_process` starts it).

It loads the weights with the stock classes of diffusers and transformers, runs the case once, writes what comes out, prints the
versions as a line of JSON, and then answers every line on its standard input with the times of one more run. Nothing of JAX is
imported.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def _modules(kind: str, folder: Path, compile: bool):
  """The network of a case; compile: its forward goes through torch.compile. Imports one of two libraries that take seconds."""
  if kind.startswith("vae"):
    import diffusers

    model = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    parts = [model.encoder, model.decoder]
  elif kind == "vlm_prefill":
    import transformers

    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "vlm").model.language_model
    parts = [model]
  else:
    import diffusers

    model = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")
    parts = [model]
  for part in parts if compile else []:
    part.compile()
  return model.eval()


def _forward(model, x):
  def run():
    out = model(x["latents"], encoder_hidden_states=x["context"], pooled_projections=x["pooled"], timestep=x["timestep"])
    return {"velocity": out.sample}

  return run


def _train(model, x, optim: dict):
  """Noising, loss, gradients, clipping, fused AdamW. Its first moments are what is compared, after the first step."""
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=optim["lr"], betas=optim["betas"], weight_decay=optim["weight_decay"], fused=True
  )
  sigma = (x["timestep"] / 1000).reshape(-1, 1, 1, 1)

  def run():
    noisy = (1 - sigma) * x["latents"] + sigma * x["noise"]
    out = model(noisy, encoder_hidden_states=x["context"], pooled_projections=x["pooled"], timestep=x["timestep"]).sample
    loss = torch.nn.functional.mse_loss(out, x["noise"] - x["latents"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip"])
    optimizer.step()
    optimizer.zero_grad()
    moments = {f"moment {name}": optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **moments}

  return run


def _sampler(model, x, guidance: float):
  def run():
    latents = x["noise"]
    for sigma, following in zip(x["sigmas"][:-1], x["sigmas"][1:]):
      v = model(
        latents.repeat(2, 1, 1, 1),
        encoder_hidden_states=x["context"],
        pooled_projections=x["pooled"],
        timestep=(1000 * sigma).expand(2),
      ).sample
      latents = latents + (following - sigma) * (v[:1] + guidance * (v[1:] - v[:1]))
    return {"latents": latents}

  return run


def _encode(model, x):
  def run():
    posterior = model.encode(x["image"] / 127.5 - 1).latent_dist
    return {"mean": posterior.mean, "log-variance": posterior.logvar}

  return run


def build(kind: str, folder: Path, settings: dict, compile: bool):
  """run() -> {name: tensor}, what `cases.Job.read` gives on our side."""
  x = load_file(folder / "inputs.safetensors")
  model = _modules(kind, folder, compile)
  if kind == "dit_train":
    return _train(model, x, settings["optim"])
  run = {
    "dit_forward": lambda: _forward(model, x),
    "sampler": lambda: _sampler(model, x, settings["guidance"]),
    "vae_encode": lambda: _encode(model, x),
    "vae_decode": lambda: lambda: {"image": model.decode(x["latents"]).sample},
    "vlm_prefill": lambda: lambda: {"hidden": model(input_ids=x["ids"].long(), use_cache=False).last_hidden_state},
  }[kind]()
  return torch.no_grad()(run)


def main() -> None:
  parser = argparse.ArgumentParser(prog="torch_worker.py", allow_abbrev=False)
  parser.add_argument("folder", type=Path)
  parser.add_argument("output", type=Path)
  parser.add_argument("kind")
  parser.add_argument("--settings", type=json.loads, default={})
  parser.add_argument("--threads", type=int, default=1)
  parser.add_argument("--compile", action="store_true")
  arguments = parser.parse_args()
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print must not look like an answer
  torch.set_num_threads(arguments.threads)
  run = build(arguments.kind, arguments.folder, arguments.settings, arguments.compile)
  save_file({name: tensor.float().contiguous() for name, tensor in run().items()}, arguments.output)
  versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
  print(json.dumps(versions), file=answers)
  for _ in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), file=answers)


if __name__ == "__main__":
  main()
