"""Rollouts of stage 3: prompts -> images of the current policy, their rewards and advantages -> the micro-batches of updates.

What a rollout keeps stays on the device, cut once into the pieces that micro-batches are made of. Rewards run in the background
while the device makes the next images. Their answers are written down per rollout: a run that is resumed makes a rollout again
from its keys, and takes the answers that it already has, which a remote judge might not give twice.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deepgen_jax import sharding
from deepgen_jax.data.images import fix_pixels, load_image
from deepgen_jax.flow.schedule import inference_sigmas
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.rewards.reward import Item
from deepgen_jax.rl.advantages import advantages
from deepgen_jax.rl.rollout import make_velocity, replay, rollout, sample_keys

INPUTS = ("cond", "negative", "target", "references")  # what make_velocity reads of a batch
_FLAT = 1e-6  # a group whose rewards spread less than this teaches nothing


def encode(pipe: DeepGenPipeline, prompts: Sequence, pixels: tuple[int, int], guided: bool) -> dict:
  """Prompts -> inputs of `make_velocity`, a row each, on the host. References are sized as for an output of `pixels` (H, W).

  A prompt without references has none that is real where others have some. guided: with the branch of the empty text.
  """
  area = float(np.sqrt(pixels[0] * pixels[1]))
  rows = [[fix_pixels(load_image(image), area) for image in prompt.references] for prompt in prompts]
  texts = [prompt.text for prompt in prompts]
  cond = pipe.encode_prompt([""] * len(texts) + texts if guided else texts, rows + rows if guided else rows)
  part = lambda rows: jax.tree.map(lambda x: np.asarray(x)[rows], cond)
  inputs = {"cond": part(slice(-len(texts), None))}
  inputs["target"] = pipe.target(len(texts), *(side // pipe.config.vae.factor for side in pixels))
  if guided:
    inputs["negative"] = part(slice(None, len(texts)))
  if any(rows):
    inputs["references"] = pipe.references([[pipe.encode_image(image) for image in row] for row in rows])
  return inputs


def items_of(prompts: Sequence, images: np.ndarray, group_size: int, first_group: int = 0) -> tuple[list[Item], list]:
  """Images of successive groups of `prompts`, [len(prompts) * group_size,H,W,3] -> (items to judge, weights of each)."""
  items = []
  for group, prompt in enumerate(prompts):
    references = tuple(load_image(reference) for reference in prompt.references)
    own = images[group * group_size : (group + 1) * group_size]
    items += [Item(prompt.text, image, references, first_group + group, prompt.metadata) for image in own]
  return items, [prompt.weights for prompt in prompts for _ in range(group_size)]


def reward_scalars(rewards, weights, names: Sequence[str], datasets: Sequence[str], group_size: int) -> dict[str, float]:
  """Rewards and weights [B,F] (NaN: missing), data set of each sample -> mean and deviation of every reward in every data set
  that weighs it, how many are missing, the weighted sum, and the share of groups without any spread.
  """
  found, asked, datasets = {}, weights > 0, np.asarray(datasets)
  for column, name in enumerate(names):
    found[f"missing/{name}"] = int((np.isnan(rewards[:, column]) & asked[:, column]).sum())
    for dataset in dict.fromkeys(datasets):
      values = rewards[asked[:, column] & (datasets == dataset), column]
      values = values[~np.isnan(values)]
      if len(values):
        label = f"{name}/{dataset}" if dataset else name
        found |= {f"reward/{label}": float(values.mean()), f"reward_std/{label}": float(values.std())}
  total = np.where(asked, rewards * weights, 0).sum(1)  # NaN where a reward that counts is missing
  groups = total.reshape(-1, group_size)
  with_all = groups[~np.isnan(groups).any(1)]
  if len(with_all):
    found |= {"reward": float(with_all.mean()), "zero_std_groups": float((with_all.std(1) < _FLAT).mean())}
  return found


def window_start(number: int, steps: int, window: int, every: int, draw: np.random.Generator) -> int:
  """The first stochastic step of rollout `number`: drawn (Flow-GRPO-Fast), or with `every` > 0 moving on by a step every so
  many rollouts and round again (MixGRPO). The sampler's last step stays outside.
  """
  places = steps - window
  if not window or places < 2:
    return 0
  return (number // every) % places if every else int(draw.integers(places))


class Answers:
  """What the judges said of each rollout, in `folder`, a file each: exact floats, null where missing."""

  def __init__(self, folder: epath.Path):
    self._folder = epath.Path(folder)

  def _file(self, number: int) -> epath.Path:
    return self._folder / f"{number:07d}.json"

  def read(self, number: int) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """-> (rewards [B,F], weights [B,F], names), or None where there is no (whole) answer yet."""
    try:
      kept = json.loads(self._file(number).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
      return None
    return np.array(kept["rewards"], np.float64), np.array(kept["weights"], np.float64), kept["names"]

  def write(self, number: int, rewards, weights, names) -> None:
    """Keeps the answers of a rollout."""
    self._folder.mkdir(parents=True, exist_ok=True)
    plain = [[None if np.isnan(value) else value for value in row] for row in np.asarray(rewards).tolist()]
    text = json.dumps({"names": list(names), "rewards": plain, "weights": np.asarray(weights).tolist()})
    self._file(number).write_text(text)


class Rollouts:
  """`run(params, number)` makes a rollout; then `micro_batches(part)` gives those of its part-th update."""

  def __init__(self, config, pipe, model, mesh, prompts, score, answers: Answers):
    """pipe(params) -> DeepGenPipeline; prompts[i] -> the i-th prompt drawn; score: a `rewards.mixture.Mixture`."""
    self._settings = g = config.grpo
    self._seed, self._pipe, self._prompts = config.seed, pipe, prompts
    self._score, self._answers = score, answers
    self.pixels = tuple(g.size) or (model.config.image_size,) * 2
    tokens = self.pixels[0] * self.pixels[1] // (model.config.vae.factor * model.config.dit.patch_size) ** 2
    self.sigmas = inference_sigmas(model.config.scheduler, g.steps, tokens)
    self.window = 0 if g.sampler == "ode" else g.window or g.steps - 1
    self._sharding = sharding.batch_sharding(mesh)
    program = functools.partial(
      rollout,
      model,
      size=tuple(side // model.config.vae.factor for side in self.pixels),
      kind=g.sampler,
      eta=g.eta,
      window=self.window,
      guidance=g.guidance,
    )
    self._sample = jax.jit(program, out_shardings=self._sharding)
    self._take = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree), out_shardings=self._sharding)
    self._at = jax.jit(_at_step, out_shardings=self._sharding)
    self._old = jax.jit(functools.partial(_old_policy, model, g), out_shardings=self._sharding)
    self.scalars: dict[str, float] = {}
    self._pieces: list[list[dict]] = []
    self._before: list[list[dict]] = []
    self._ended = 0.0

  def run(self, params: Mapping, number: int) -> None:
    """Rollout `number` with the policy `params` ("old" where that is kept), its rewards and advantages."""
    g = self._settings
    jax.block_until_ready(params)  # the update before this has ended
    started = time.monotonic()
    self.scalars = {"seconds_update": started - self._ended} if self._ended else {}
    self._pieces, self._before = [], []  # the last rollout's memory goes back before this one's is taken
    prompts = [self._prompts[number * g.prompts + i] for i in range(g.prompts)]
    policy = params.get("old", params)
    count = g.prompts * g.group_size
    draw = np.random.default_rng((self._seed, number))
    self.start = window_start(number, g.steps, self.window, g.window_every, draw)
    inputs, made = self._make(params, policy, prompts, number)
    pending, rewards, weights, names = [], *(self._answers.read(number) or (None, None, None))
    batch = g.rollout_batch or count
    for place, piece in enumerate(made):  # judges work on these images while the device makes the next ones
      images = np.asarray(piece.images)
      if rewards is None:
        groups = slice(place * batch // g.group_size, (place + 1) * batch // g.group_size)
        pending.append(self._score.submit(*items_of(prompts[groups], images, g.group_size, groups.start)))
    sampled = time.monotonic()
    if rewards is None:
      scores = [one.result() for one in pending]
      rewards, weights = (np.concatenate([getattr(s, key) for s in scores]) for key in ("rewards", "weights"))
      names = scores[0].names
      self._answers.write(number, rewards, weights, names)
    self.scalars |= reward_scalars(rewards, weights, names, np.repeat([p.dataset for p in prompts], g.group_size), g.group_size)
    advantage = np.asarray(advantages(g.advantage, rewards, weights, g.group_size))
    self.scalars |= {"advantage_abs": float(np.abs(advantage).mean()), "window_start": self.start}
    self._cut(inputs, made, np.clip(advantage, -g.advantage_clip, g.advantage_clip), draw)
    self._places = self._draw_places(draw)
    if g.updates_per_rollout > 1 and g.objective != "diffusion_nft":
      self._before = [[self._old(params, batch) for batch in self._batches(part)] for part in range(g.updates_per_rollout)]
    self._ended = time.monotonic()
    self.scalars |= {"seconds_rollout": sampled - started, "seconds_rewards": self._ended - sampled}

  def micro_batches(self, part: int, share: float, others: int) -> Iterator[dict]:
    """Those of update `part`: together they weigh `share` of it; `others` more micro-batches make up the rest."""
    g = self._settings
    own = len(self._places) * len(self._pieces[part])
    for place, batch in enumerate(self._batches(part)):
      rows = len(batch["sample_id"])
      weight = np.full(rows, share * (own + others) / own, np.float32)
      old = self._before[part][place] if self._before else {}
      fresh = np.full(rows, part == 0, np.float32)  # the weights are still the rollout's
      extra = {} if g.objective == "diffusion_nft" else {"fresh": fresh}
      yield batch | old | extra | {"weight": weight, "micro_batches": np.full(rows, own + others, np.int32)}

  def _make(self, params, policy, prompts, number):
    """-> (inputs of each chunk, Rollout of each chunk), on the device; returns while it works."""
    g = self._settings
    inputs = encode(self._pipe(params), prompts, self.pixels, g.guidance > 1)
    inputs = jax.tree.map(lambda x: np.repeat(np.asarray(x), g.group_size, axis=0), inputs)
    count = g.prompts * g.group_size
    key = jax.random.fold_in(jax.random.key(self._seed), 1)  # the loop's own key, folded: nothing else draws from it
    noise_keys, keys = sample_keys(key, number, count, g.group_size, g.shared_noise)
    batch, chunks, made = g.rollout_batch or count, [], []
    needed = {part: policy[part] for part in ("dit", "vae")}
    for start in range(0, count, batch):
      rows = slice(start, start + batch)
      chunk = jax.device_put(jax.tree.map(lambda x, rows=rows: x[rows], inputs), self._sharding)
      drawn = jax.device_put((noise_keys[rows], keys[rows]), self._sharding)
      chunks.append(chunk)
      made.append(self._sample(needed, chunk, *drawn, self.sigmas, np.int32(self.start)))
    return chunks, made

  def _cut(self, inputs, made, advantage, draw) -> None:
    """Keeps the rollout as pieces, [update][micro-batch]: the samples of an update are drawn, each takes part once."""
    g, count = self._settings, len(advantage)
    kept = ("latents",) if g.objective == "diffusion_nft" else ("path", "log_prob")
    chunks = [chunk | {name: getattr(one, name) for name in kept} for chunk, one in zip(inputs, made)]
    whole = chunks[0] if len(chunks) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)
    order = np.arange(count) if g.updates_per_rollout == 1 else draw.permutation(count)
    rows = order.reshape(g.updates_per_rollout, -1, g.micro_batch or count // g.updates_per_rollout)
    cut = lambda own: whole if len(own) == count else self._take(whole, own)
    host = lambda own: {"advantage": advantage[own].astype(np.float32), "sample_id": own.astype(np.uint32)}
    self._pieces = [[cut(own) | host(own) for own in part] for part in rows]

  def _batches(self, part: int) -> Iterator[dict]:
    """Timestep by timestep, the micro-batches of an update without their weights."""
    nft = self._settings.objective == "diffusion_nft"
    for place in self._places:
      step = int(place) if nft else self.start + int(place)
      for piece in self._pieces[part]:
        full = lambda value, like=piece["advantage"]: np.full_like(like, value)
        batch = {key: value for key, value in piece.items() if key not in ("path", "log_prob")}
        batch |= {"sigma": full(self.sigmas[step])}
        if not nft:
          batch |= {"sigma_next": full(self.sigmas[step + 1]), "sigma_max": full(self.sigmas[1])}
          batch |= self._at(piece["path"], piece["log_prob"], np.int32(place))
        yield jax.device_put(batch, self._sharding)

  def _draw_places(self, draw) -> np.ndarray:
    """The steps that this rollout trains, of its window (diffusion_nft: of the grid)."""
    g = self._settings
    steps = g.steps if g.objective == "diffusion_nft" else self.window
    return np.sort(draw.choice(steps, g.train_steps or steps, replace=False))


def _at_step(path, log_prob, place) -> dict[str, Any]:
  """The window's step `place` of a piece."""
  pick = functools.partial(jax.lax.dynamic_index_in_dim, axis=1, keepdims=False)
  return {"latents": pick(path, place), "next": pick(path, place + 1), "rollout_log_prob": pick(log_prob, place)}


def _old_policy(model, settings, params, batch) -> dict:
  """What several updates of a rollout compare with, computed as they compute it: log-probability, for grpo_guard the mean."""
  inputs = {name: batch[name] for name in INPUTS if name in batch}
  velocity = make_velocity(model, params, inputs, settings.guidance)(batch["latents"], batch["sigma"])
  step = replay(settings.sampler, settings.eta, velocity, batch)
  old = {"old_log_prob": step.log_prob}
  return old | ({"old_mean": step.mean} if settings.objective == "grpo_guard" else {})
