"""Rollouts of stage 3: prompts -> images of the current policy, their rewards and advantages -> the micro-batches of updates.

What a rollout keeps stays on the device, cut once into the pieces that micro-batches are made of. Rewards run in the background
while the device makes the next images. Their answers are written down per rollout: a run that is resumed makes a rollout again
from its keys, and takes the answers that it already has, which a remote judge might not give twice.

Several processes go through all of this together, with the same prompts, keys and answers; only of judging each does its share.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deepgen_jax import distributed, sharding
from deepgen_jax.data.images import fix_pixels, load_image
from deepgen_jax.flow.schedule import inference_sigmas
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.rewards.reward import Item
from deepgen_jax.rl.advantages import advantages
from deepgen_jax.rl.rollout import Rollout, make_velocity, replay, rollout, sample_keys
from deepgen_jax.stages.step import in_compute_dtype

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
  cond = distributed.gathered(cond)
  part = lambda rows: jax.tree.map(lambda x: x[rows], cond)
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


class Judges:
  """The images of a call as they come, judged in the background: `submit` some groups, then `result`.

  Of several processes each has its own judges, here or on a server: they share the groups, so that every image is judged once,
  and tell each other what they found.
  """

  def __init__(self, score, group_size: int):
    """score: a `rewards.mixture.Mixture`."""
    self._score, self._group_size = score, group_size
    self._pending: list[tuple] = []

  def submit(self, prompts: Sequence, images: np.ndarray, first_group: int = 0) -> None:
    """As `items_of`; every process has all images."""
    items, weights = items_of(prompts, images, self._group_size, first_group)
    own = [i for i, item in enumerate(items) if item.group % jax.process_count() == jax.process_index()]
    if own:
      rows = [first_group * self._group_size + i for i in own]
      self._pending.append((rows, self._score.submit([items[i] for i in own], [weights[i] for i in own])))

  def result(self) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """-> (rewards [B,F], weights [B,F], names) of all that was submitted, the same on every process, which all call this."""
    found = [(rows, pending.result()) for rows, pending in self._pending]
    told = {"rows": [row for rows, _ in found for row in rows]}
    told |= {key: [row for _, scores in found for row in getattr(scores, key).tolist()] for key in ("rewards", "weights")}
    parts = [json.loads(part) for part in distributed.shared(json.dumps(told))]  # floats survive, NaN among them
    rows, rewards, weights = ([row for part in parts for row in part[key]] for key in ("rows", "rewards", "weights"))
    order = np.argsort(rows)
    return np.array(rewards, np.float64)[order], np.array(weights, np.float64)[order], self._score.names


class Answers:
  """What the judges said of each rollout, in `folder`, a file each: exact floats, null where missing.

  The main process reads and writes them, whichever disks the others see.
  """

  def __init__(self, folder: epath.Path):
    self._folder = epath.Path(folder)

  def _file(self, number: int) -> epath.Path:
    return self._folder / f"{number:07d}.json"

  def read(self, number: int) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """-> (rewards [B,F], weights [B,F], names), or None where there is no (whole) answer yet; called by all processes."""
    text = self._file(number).read_text() if distributed.is_main() and self._file(number).exists() else ""
    try:
      said = json.loads(distributed.shared(text)[0])
    except json.JSONDecodeError:
      return None
    return np.array(said["rewards"], np.float64), np.array(said["weights"], np.float64), said["names"]

  def write(self, number: int, rewards, weights, names) -> None:
    """Keeps the answers of a rollout."""
    if not distributed.is_main():
      return
    self._folder.mkdir(parents=True, exist_ok=True)
    plain = [[None if np.isnan(value) else value for value in row] for row in np.asarray(rewards).tolist()]
    text = json.dumps({"names": list(names), "rewards": plain, "weights": np.asarray(weights).tolist()})
    self._file(number).write_text(text)


def grid(settings, model) -> tuple[tuple[int, int], np.ndarray, int]:
  """-> (height and width in pixels, sigmas [S+1], how many steps are stochastic) of a rollout."""
  pixels = tuple(settings.size) or (model.config.image_size,) * 2
  tokens = pixels[0] * pixels[1] // (model.config.vae.factor * model.config.dit.patch_size) ** 2
  window = 0 if settings.sampler == "ode" else settings.window or settings.steps - 1
  return pixels, inference_sigmas(model.config.scheduler, settings.steps, tokens), window


def sampler(settings, model) -> Callable[..., Rollout]:
  """-> rollout(params of DiT and VAE, inputs, noise keys, keys, sigmas, start): `rl.rollout.rollout` as the settings say."""
  pixels, _, window = grid(settings, model)
  size = tuple(side // model.config.vae.factor for side in pixels)
  own = {"size": size, "kind": settings.sampler, "eta": settings.eta, "window": window, "guidance": settings.guidance}
  return lambda params, *args: rollout(model, in_compute_dtype(params, model.dtype), *args, **own)


class Programs:
  """What a rollout runs on the mesh; `estimate` compiles the same."""

  def __init__(self, config, model, mesh):
    settings, dealt = config.grpo, sharding.batch_sharding(mesh)
    program = lambda fn, out=dealt: sharding.jit(fn, mesh, out_shardings=out)
    # Every process gets all images from its own devices, in the program that makes them: nothing waits for other chunks.
    seen = dealt if dealt.is_fully_addressable else sharding.replicated(mesh)
    self.shardings = Rollout(seen, dealt, dealt, dealt)
    self.sample = program(sampler(settings, model), self.shardings)
    self.draw = program(functools.partial(_draw_keys, config.seed, settings))
    self.take = program(_take)
    self.at = program(at_step)
    self.old = program(functools.partial(_old_policy, model, settings))


def step_batch(settings, sigmas: np.ndarray, start: int, piece: Mapping, place: int | np.ndarray, at: Callable) -> dict:
  """A piece of a rollout at the window's step `place` (diffusion_nft: of the grid, one for each row): what a train step takes,
  but its weights.

  piece: the rows' inputs, advantage and sample_id, and what `kept` names. at: `at_step` or its program.
  """
  rows, nft = len(piece["advantage"]), settings.objective == "diffusion_nft"
  full = lambda value: np.full(rows, value, np.float32)
  step = place if nft else start + place
  batch = {key: value for key, value in piece.items() if nft or key not in kept(settings)} | {"sigma": full(sigmas[step])}
  if not nft:
    batch |= {"sigma_next": full(sigmas[step + 1]), "sigma_max": full(sigmas[1])}
    batch |= at(piece["path"], piece["log_prob"], np.int32(place))
  return batch


def kept(settings) -> tuple[str, ...]:
  """Which fields of a Rollout its updates need."""
  return ("latents",) if settings.objective == "diffusion_nft" else ("path", "log_prob")


def weights_of(settings, rows: int, share: float, own: int, others: int, fresh: bool) -> dict[str, np.ndarray]:
  """What tells the train step the place of a micro-batch of `rows` samples in its update: `own` such ones together weigh
  `share` of it, `others` more make up the rest. fresh: the weights are still the rollout's.
  """
  extra = {} if settings.objective == "diffusion_nft" else {"fresh": np.full(rows, fresh, np.float32)}
  weight = np.full(rows, share * (own + others) / own, np.float32)
  return extra | {"weight": weight, "micro_batches": np.full(rows, own + others, np.int32)}


class Rollouts:
  """`make` a rollout, `judge` it; then `micro_batches(part)` gives those of its part-th update."""

  def __init__(self, config, pipe, model, mesh, prompts, score, answers: Answers):
    """pipe(params) -> DeepGenPipeline; prompts[i] -> the i-th prompt drawn; score: a `rewards.mixture.Mixture`."""
    self._settings = g = config.grpo
    self._seed, self._pipe, self._prompts = config.seed, pipe, prompts
    self._score, self._answers = score, answers
    self.pixels, self.sigmas, self.window = grid(g, model)
    self._programs, self._dealt = Programs(config, model, mesh), sharding.batch_sharding(mesh)
    self.scalars: dict[str, float] = {}
    self._pieces: list[list[dict]] = []
    self._before: list[list[dict]] = []
    self._made: tuple | None = None
    self._ended = 0.0

  def make(self, params: Mapping, number: int) -> None:
    """Images of rollout `number` with the policy `params` ("old" where that is kept); judges start as soon as they see them."""
    g = self._settings
    jax.block_until_ready(params)  # the update before this has ended
    started = time.monotonic()
    self.scalars = {"seconds_update": started - self._ended} if self._ended else {}
    self._pieces, self._before = [], []  # the last rollout's memory goes back before this one's is taken
    prompts = [self._prompts[number * g.prompts + i] for i in range(g.prompts)]
    draw = np.random.default_rng((self._seed, number))
    self.start = window_start(number, g.steps, self.window, g.window_every, draw)
    inputs, made = self._make(params, params.get("old", params), prompts, number)
    known, judges = self._answers.read(number), Judges(self._score, g.group_size)
    batch = g.rollout_batch or g.prompts * g.group_size
    for place, piece in enumerate(made):  # judges work on these images while the device makes the next ones
      images = np.asarray(piece.images)
      if known is None:
        groups = slice(place * batch // g.group_size, (place + 1) * batch // g.group_size)
        judges.submit(prompts[groups], images, groups.start)
    self.scalars["seconds_rollout"] = time.monotonic() - started
    self._made = (number, prompts, inputs, made, draw, known, judges)

  def judge(self, params: Mapping) -> None:
    """Rewards and advantages of what `make` made, and the micro-batches of its updates."""
    g, count = self._settings, self._settings.prompts * self._settings.group_size
    number, prompts, inputs, made, draw, known, judges = self._made
    self._made = None
    sampled = time.monotonic()
    rewards, weights, names = known or judges.result()
    self.scalars["seconds_rewards"] = time.monotonic() - sampled  # that something waited for them
    if known is None:
      self._answers.write(number, rewards, weights, names)
    self.scalars |= reward_scalars(rewards, weights, names, np.repeat([p.dataset for p in prompts], g.group_size), g.group_size)
    if g.shuffle_rewards:
      order = np.random.default_rng((self._seed, number, 1)).permutation(count)
      rewards, weights = rewards[order], weights[order]
    advantage = np.asarray(advantages(g.advantage, rewards, weights, g.group_size))
    self.scalars |= {"advantage_abs": float(np.abs(advantage).mean()), "window_start": self.start}
    self._cut(inputs, made, np.clip(advantage, -g.advantage_clip, g.advantage_clip), draw)
    self._places = self._draw_places(draw)
    if g.updates_per_rollout > 1 and g.objective != "diffusion_nft":
      old = self._programs.old
      self._before = [[old(params, batch) for batch in self._batches(part)] for part in range(g.updates_per_rollout)]
    self._ended = time.monotonic()

  def micro_batches(self, part: int, share: float, others: int) -> Iterator[dict]:
    """Those of update `part`: together they weigh `share` of it; `others` more micro-batches make up the rest."""
    own = len(self._places) * len(self._pieces[part])
    for place, batch in enumerate(self._batches(part)):
      old = self._before[part][place] if self._before else {}
      weights = weights_of(self._settings, len(batch["sample_id"]), share, own, others, fresh=part == 0)
      yield batch | old | self._deal(weights)

  def _make(self, params, policy, prompts, number):
    """-> (inputs of each chunk, Rollout of each chunk), on the device; returns while it works."""
    g = self._settings
    inputs = encode(self._pipe(params), prompts, self.pixels, g.guidance > 1)
    inputs = jax.tree.map(lambda x: np.repeat(x, g.group_size, axis=0), inputs)
    count = g.prompts * g.group_size
    batch, chunks, made = g.rollout_batch or count, [], []
    needed = {part: policy[part] for part in ("dit", "vae")}
    for start in range(0, count, batch):
      rows = np.arange(start, start + batch)
      chunk = self._deal(jax.tree.map(lambda x, rows=rows: x[rows], inputs))
      drawn = self._programs.draw(np.uint32(number), rows)
      chunks.append(chunk)
      made.append(self._programs.sample(needed, chunk, *drawn, self.sigmas, np.int32(self.start)))
    return chunks, made

  def _cut(self, inputs, made, advantage, draw) -> None:
    """Keeps the rollout as pieces, [update][micro-batch]: the samples of an update are drawn, each takes part once."""
    g, count = self._settings, len(advantage)
    chunks = [chunk | {name: getattr(one, name) for name in kept(g)} for chunk, one in zip(inputs, made)]
    order = np.arange(count) if g.updates_per_rollout == 1 else draw.permutation(count)
    rows = order.reshape(g.updates_per_rollout, -1, g.micro_batch or count // g.updates_per_rollout)
    cut = lambda own: chunks[0] if len(chunks) == 1 and len(own) == count else self._programs.take(chunks, own)
    host = lambda own: {"advantage": advantage[own].astype(np.float32), "sample_id": own.astype(np.uint32)}
    self._pieces = [[cut(own) | host(own) for own in part] for part in rows]

  def _batches(self, part: int) -> Iterator[dict]:
    """Timestep by timestep, the micro-batches of an update without their weights."""
    for places in self._places:
      for piece in self._pieces[part]:
        place = places[piece["sample_id"]] if places.ndim else int(places)
        yield self._deal(step_batch(self._settings, self.sigmas, self.start, piece, place, self._programs.at))

  def _deal(self, tree):
    """Arrays of all samples, the same on every process, dealt to the devices."""
    return sharding.place(tree, jax.tree.map(lambda _: self._dealt, tree))

  def _draw_places(self, draw) -> np.ndarray:
    """The steps that this rollout trains, of its window [n]; for diffusion_nft of the grid, each sample its own [n,samples]."""
    g = self._settings
    if g.objective == "diffusion_nft":
      order = [draw.permutation(g.steps)[: g.train_steps or g.steps] for _ in range(g.prompts * g.group_size)]
      return np.stack(order, axis=1)
    return np.sort(draw.choice(self.window, g.train_steps or self.window, replace=False))


def _draw_keys(seed: int, settings, number, rows) -> tuple[jax.Array, jax.Array]:
  """Keys of these samples of rollout `number`: (of their initial noise, of their steps)."""
  key = jax.random.fold_in(jax.random.key(seed), 1)  # the loop's own key, folded: nothing else draws from it
  keys = sample_keys(key, number, settings.prompts * settings.group_size, settings.group_size, settings.shared_noise)
  return jax.tree.map(lambda x: x[rows], keys)


def _take(chunks: Sequence[dict], rows) -> dict:
  """These rows of what the chunks hold, one after the other."""
  return jax.tree.map(lambda *parts: jnp.concatenate(parts)[rows], *chunks)


def at_step(path, log_prob, place) -> dict[str, Any]:
  """The window's step `place` of a piece."""
  pick = functools.partial(jax.lax.dynamic_index_in_dim, axis=1, keepdims=False)
  return {"latents": pick(path, place), "next": pick(path, place + 1), "rollout_log_prob": pick(log_prob, place)}


def _old_policy(model, settings, params, batch) -> dict:
  """What several updates of a rollout compare with, computed as they compute it: log-probability, for grpo_guard the mean."""
  inputs = {name: batch[name] for name in INPUTS if name in batch}
  params = in_compute_dtype({"dit": params["dit"]}, model.dtype)
  velocity = make_velocity(model, params, inputs, settings.guidance)(batch["latents"], batch["sigma"])
  step = replay(settings.sampler, settings.eta, velocity, batch)
  old = {"old_log_prob": step.log_prob}
  return old | ({"old_mean": step.mean} if settings.objective == "grpo_guard" else {})
