"""The keys that every stage has, in one place, with their defaults."""

from ml_collections import ConfigDict


def get_config(size: str = "tiny") -> ConfigDict:
  """Defaults for a size of model, "tiny" or "full"."""
  if size not in ("tiny", "full"):
    raise ValueError(f"size {size!r} must be tiny or full")
  tiny = size == "tiny"
  c = ConfigDict()
  c.seed = 0
  c.stage = "supervised"
  c.size = size
  c.init = "tiny" if tiny else ""  # what --model takes: a model directory, a workdir, or "tiny", the base that is shipped
  c.steps = 1000  # updates
  c.trainable = [(".*", True)]  # path regex -> trains; first match wins, no match is an error
  c.dtype = "auto"  # compute dtype: bfloat16 on TPU and GPU, float32 on CPU
  # what blocks keep for the backward pass: "none" (all of it), "dots", "attention" (the kernel's results) or "full" (nothing);
  # "auto": by the memory of the devices
  c.remat = "none" if tiny else "auto"
  # where what doesn't train lies on a mesh: "fsdp" (split over it, like the rest), "whole" (on each of its devices: nothing to
  # gather in a step) or "auto" (whole on devices of 64 GiB or more)
  c.frozen = "auto"
  c.attention = "auto"  # "splash" (TPU), "cudnn" (NVIDIA GPUs, bfloat16) or "xla"; "auto": what there is a kernel for
  c.unroll = tiny  # write scans over layers out: faster on CPU, slow to compile at full size
  c.max_programs = 16  # compiled train steps: tasks x reference counts x text buckets
  c.max_nonfinite = 10  # updates in a row with a non-finite loss before the run stops
  # how training draws sigma: "none" (uniform over the shifted grid) or "logit_normal"
  c.timesteps = ConfigDict({"weighting": "none", "logit_mean": 0.0, "logit_std": 1.0})
  c.lora = ConfigDict({"targets": [], "rank": 64, "alpha": 128.0, "dropout": 0.05})  # targets: path regexes
  c.optim = ConfigDict(
    {
      "lr": 1e-4,
      "lr_groups": [],  # path regex -> factor on lr; first match wins; empty: 1 everywhere
      "warmup": 0.01,  # fraction of all updates
      "schedule": "cosine",
      "betas": (0.9, 0.95),
      "weight_decay": 0.05,
      "clip": 1.0,
      "ema": 0.0,  # decay per update; 0 keeps none
    }
  )
  c.data = ConfigDict(
    {
      "dir": "runs/data",  # where the embedded emoji set is built
      # KIND:PATH or a dict of uri, weight (counts among the sources of a task) and options: see deepgen_jax/data/mixture.py
      "sources": ({"uri": "emoji", "weight": 0.9}, {"uri": "words", "weight": 0.1}, "emoji-edits"),
      "batch_size": 8 if tiny else 64,  # samples of a micro-batch, all devices together
      "image_size": 0,  # images get about its square of pixels; a multiple of 32, with edits up to 928; 0: the model's
      "pattern": ("generate",),  # tasks of the micro-batches of one update
      "text_buckets": (116, 256) if tiny else (64, 128, 256, 384, 512, 1024),  # tiny: every emoji prompt fits the first
      "caption_dropout": 0.1,
      "token_multiple": 16 if tiny else 128,  # image tokens are padded to a multiple of this
      "precomputed": "",  # the --output of `python -m deepgen_jax.data.precompute`; "": images are encoded as they come
      "cache_images": 20_000 if tiny else 0,  # encoded images kept in memory
      "max_bad_share": 0.05,  # of a source's samples: past that, the run stops
      # pixels of the shorter side; longer side / shorter side; characters. What they leave out is counted, and isn't bad
      "filters": {"min_side": 0 if tiny else 80, "max_aspect": 10.0, "max_text": 8000},
    }
  )
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1} if tiny else {"data": 1, "fsdp": -1, "tensor": 1})  # -1 fills
  c.distributed = "off"  # several processes: "auto" (TPU pods, GKE, SLURM, Open MPI) or "HOST:PORT/COUNT/INDEX"
  # every: updates; the last `keep` checkpoints stay, and with keep_every (a multiple of every) one of every so many updates
  c.checkpoint = ConfigDict({"every": 500, "keep": 2, "keep_every": 0})
  c.log = ConfigDict({"every": 10, "samples": False})  # samples: the ids that each update was made of, in samples.jsonl
  # every: updates (0: never); samples: held-out ones of a task that are judged; pictures: grids of what the weights make
  c.eval = ConfigDict({"every": 500, "samples": 224, "pictures": True})
  c.profile = ""  # "START:END": a trace of these updates goes to WORKDIR/profile
  return c
