"""Trains any stage: `python -m deepgen_jax.train --config configs/align.py:tiny --workdir runs/align [--config.KEY=VALUE ...]`.

The same command resumes. One loop for all stages; what differs between them is in `deepgen_jax/stages`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading

import jax
import numpy as np
from etils import epath

from deepgen_jax import atomic, checkpoint, distributed, sharding, stages
from deepgen_jax.cli import parse, split_overrides, start_command
from deepgen_jax.config import flatten, load_config, to_json
from deepgen_jax.errors import Stalled, UserError, run_command
from deepgen_jax.log import Log, Profiler, SampleLog, Silent
from deepgen_jax.stages.step import between_updates, full_params, in_compute_dtype, jit_step, may_complete

LAST_SAVE = 600  # seconds that a run may take to save when its data hangs


def train(config, workdir: epath.Path) -> None:
  """Runs or resumes a training until `config.steps` updates, or until a signal tells it to stop (`distributed.Stop`)."""
  stop = distributed.Stop()
  try:
    _train(config, workdir, stop)
  finally:
    stop.close()


def _train(config, workdir: epath.Path, stop: distributed.Stop) -> None:
  """Restore order: the workdir's newest checkpoint, else config.init."""
  config_json = to_json(config)
  distributed.check_same(json.dumps({k: v for k, v in flatten(config) if k != "distributed"}, default=str))
  distributed.on_main(lambda: checkpoint.check_config(workdir, config_json))
  mesh = sharding.make_mesh(config.mesh.to_dict())
  profiler = Profiler(config.profile, workdir / "profile")
  stage = stages.build(config, mesh, workdir)
  accumulate = stage.host_batches or len(config.data.pattern)
  images = stage.images or accumulate * config.data.batch_size
  if config.steps % stage.period:
    raise UserError(f"config.steps is {config.steps}; updates come {stage.period} at a time here: give a multiple of that")
  if stop.agree():
    print("stopped before the first update; the same command starts again", flush=True)
    return
  held = distributed.on_main(lambda: _take(workdir, config_json))

  trainable, frozen = sharding.partition(stage.init(), config.trainable)
  trainable = jax.tree.map(lambda x: x.astype(np.float32), trainable)
  frozen = sharding.place(in_compute_dtype(frozen, stage.dtype), sharding.frozen_shardings(frozen, mesh, config.frozen))
  fresh, state_shardings, step = jit_step(config, stage, trainable, mesh)
  ckpt = checkpoint.Checkpointer(workdir, **config.checkpoint)
  restored = ckpt.restore(jax.eval_shape(fresh, trainable), mesh)
  if restored is None:
    trainable = sharding.place(trainable, sharding.param_shardings(trainable, mesh))
    state, data_state = jax.jit(fresh, out_shardings=state_shardings)(trainable), {"micro_batches": 0}
  else:
    state, data_state = restored
  del trainable, restored
  rng = jax.jit(lambda: jax.random.key(config.seed), out_shardings=sharding.replicated(mesh))()

  done = int(state.step)
  log = (Log if distributed.is_main() else Silent)(workdir, config.steps, done, config.log.every, images)
  sample_log = SampleLog(workdir / f"samples{_own()}.jsonl", done, config.log.samples)
  samples = stage.batches.iterate(data_state["micro_batches"])
  # (update, metrics of its micro-batches on the device, the stage's own, seconds for data): fetched one update late, so that
  # the device never waits for the host
  pending, programs = None, set()

  def write(force: bool = False) -> None:
    nonlocal pending
    if pending:
      log.write(*_fetch(pending, stage, config.max_nonfinite), force=force)
      pending = None

  def save() -> None:
    """A checkpoint; what is logged up to it is on disk before it is, so that a kill in between loses no row."""
    write()
    sample_log.flush()
    log.checkpointed(done)
    ckpt.save(done, state, data_state)

  with contextlib.ExitStack() as closing:  # the last comes first, and each whatever the others do
    if held:
      closing.callback(held.close)
    record_data = lambda: _record_data(workdir, stage.batches)  # above all where bad data stopped the run
    tell = lambda: _tell_bad(log, workdir, stage.batches)
    for close in (ckpt.close, log.close, sample_log.close, tell, record_data, samples.close, profiler.close):
      closing.callback(close)
    if config.eval.every and stage.evaluate_first and done == 0:
      _report(log, done, stage.evaluate(sharding.merge(_weights(state), frozen), done))
    stop.agree()
    # The order below is fixed. Evaluation sees the weights of the update that its row names. Metrics are read after the next
    # update has been dispatched.
    while done < config.steps and not (stop and done % stage.period == 0):
      ckpt.check()
      if done % stage.period == 0 and ckpt.is_due(done):
        save()
      profiler.at(done)
      metrics = []
      for place in range(accumulate):
        try:
          host = next(samples)
        except Stalled as stalled:
          with _at_most(LAST_SAVE, stalled):
            if done % stage.period == 0 and ckpt.is_due(done, force=True):
              state = jax.jit(between_updates, donate_argnums=0, out_shardings=state_shardings)(state)
              save()
            closing.close()
          raise
        for batch in stage.prepare(full_params(state, frozen), host):
          _count_program(programs, batch, config.max_programs)
          sample_log.write(done + 1, samples.consumed - 1, batch["sample_id"])
          state, found = step(state, frozen, sharding.put_batch(batch, mesh), rng, completes=may_complete(config, place))
          metrics.append(found)
      done, data_state = done + 1, {"micro_batches": samples.consumed}
      write()
      pending = (done, metrics, stage.scalars(), samples.waited)
      stop.vote(mesh)
      if done % config.log.every == 0:
        record_data()
      if config.eval.every and (done % config.eval.every == 0 or done == config.steps):
        _report(log, done, stage.evaluate(sharding.merge(_weights(state), frozen), done))
    write(force=True)
    if ckpt.is_due(done, force=True):
      save()
    if done >= config.steps:
      stage.finish(sharding.merge(_weights(state), frozen))
    else:
      log.say(f"stopped at update {done}; the same command goes on from here")


@contextlib.contextmanager
def _at_most(seconds: float, stalled: Stalled):
  """For the last save of a run whose data hangs: what goes wrong is said, and no more; if it hangs too, the process ends."""

  def end() -> None:
    print(f"error: {stalled}; what was done since couldn't be saved within {seconds:.0f} s", file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  except Exception as error:
    print(f"what was done since the last checkpoint can't be saved: {error}", file=sys.stderr, flush=True)
  finally:
    timer.cancel()


def _take(workdir: epath.Path, config_json: str):
  """Makes the workdir and this run's own; -> what holds its lock."""
  workdir.mkdir(parents=True, exist_ok=True)
  held = checkpoint.lock(workdir)
  atomic.write_text(workdir / "config.json", checkpoint.recorded(config_json))
  return held


def _own() -> str:
  """What a file that each of several processes writes has in its name."""
  return "" if distributed.is_main() else f".{jax.process_index()}"


def _count_program(programs: set, batch: dict, limit: int) -> None:
  """Every new shape of a batch compiles a program: too many are a mistake in the data's buckets, not a slow start."""
  programs.add(tuple((jax.tree_util.keystr(path), x.shape) for path, x in jax.tree_util.tree_leaves_with_path(batch)))
  if len(programs) > limit:
    raise UserError(
      f"the train step would compile more than {limit} programs (config.max_programs), one for each task, number of references "
      "and text bucket. Use fewer or larger config.data.text_buckets, or a larger config.data.token_multiple."
    )


def _weights(state):
  """EMA weights where they are kept."""
  return state.params if state.ema is None else state.ema


def _fetch(pending, stage, max_nonfinite: int) -> tuple[int, dict[str, float], float]:
  """(update, metrics as floats, seconds for data); stops the run when too many updates in a row weren't finite."""
  step, metrics, scalars, waited = pending
  rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(metrics)]
  metrics = stage.summarise(rows) | scalars
  if metrics["skipped_in_row"] >= max_nonfinite:
    raise UserError(
      f"updates {step - max_nonfinite + 1} to {step} had a loss or gradient that isn't finite and changed no weight; "
      "stopped. Lower config.optim.lr or look at the data of these updates."
    )
  return step, metrics, waited


def _report(log: Log, step: int, report) -> None:
  if report.scalars:
    log.record(step, {f"eval/{name}": value for name, value in report.scalars.items()})
    log.say(f"update {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in report.scalars.items()))
  for name, picture in report.images.items():
    log.image(step, name, picture)


def _record_data(workdir: epath.Path, batches) -> None:
  """What became of the data so far: counts of each source, and the samples that were replaced, if any. Of several processes
  each writes of its own rows.
  """
  if counts := batches.counts():
    atomic.write_text(workdir / f"data_counts{_own()}.json", json.dumps(counts, indent=2) + "\n")
  if bad := batches.bad_samples():
    atomic.write_text(workdir / f"bad_samples{_own()}.jsonl", "".join(json.dumps(b._asdict()) + "\n" for b in bad))


def _tell_bad(log: Log, workdir: epath.Path, batches) -> None:
  if bad := len(batches.bad_samples()):
    log.say(f"{bad} samples couldn't be used, others took their place: {workdir / 'bad_samples.jsonl'}")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """-> (arguments, config overrides without their "--config." prefix); raises UserError for anything unknown."""
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.train",
    description="Trains a stage; the same command resumes.",
    epilog="example: python -m deepgen_jax.train --config configs/align.py:tiny --workdir runs/align --config.steps=200",
    allow_abbrev=False,
  )
  parser.add_argument("--config", required=True, metavar="FILE.py:SIZE", help="config file and its argument")
  parser.add_argument(
    "--workdir", required=True, metavar="DIR", help="checkpoints, metrics and samples go here; local or gs://"
  )
  parser.add_argument("--config.KEY", metavar="VALUE", help="overrides a key of the config, e.g. --config.optim.lr=1e-4")
  rest, overrides = split_overrides(argv)
  return parse(parser, rest), overrides


def main() -> None:
  start_command()
  arguments, overrides = parse_arguments(sys.argv[1:])
  config = load_config(arguments.config, overrides)
  distributed.start(config.distributed)
  train(config, epath.Path(arguments.workdir))


if __name__ == "__main__":
  run_command(main)
