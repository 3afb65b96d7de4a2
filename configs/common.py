"""The keys that every stage has, in one place, with their defaults."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0
  c.stage = "supervised"
  c.steps = 1000  # updates
  c.trainable = [(".*", True)]  # path regex -> trains; first match wins, no match is an error
  c.dtype = "auto"  # compute dtype: bfloat16 on TPU and GPU, float32 on CPU
  c.max_nonfinite = 10  # updates in a row with a non-finite loss before the run stops
  c.optim = ConfigDict(
    {
      "lr": 1e-4,
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
      "dir": "runs/data",  # where the embedded data set is built
      "batch_size": 4,  # samples of a micro-batch, all devices together
      "pattern": ("generate",),  # tasks of the micro-batches of one update
    }
  )
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1 fills
  c.checkpoint = ConfigDict({"every": 500, "keep": 2})
  c.log = ConfigDict({"every": 10})
  c.eval = ConfigDict({"every": 500})  # 0: never
  return c
