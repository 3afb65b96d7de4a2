"""Checkpoints: what is kept, what counts as damaged and what happens then, and what a workdir records beside them."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from deepgen_jax import atomic, checkpoint, sharding
from deepgen_jax.config import load_config, to_json
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.weights.load import load_model

MESH = sharding.make_mesh()
# Reads of a damaged checkpoint that are under way when the first of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step, rows=5000):
  """A state as the loop's, in small; noise that doesn't shrink when it is compressed."""
  noise = lambda seed: jnp.asarray(np.random.default_rng(seed).normal(size=(rows,)), jnp.float32)
  params = {"scb": {"norm": {"scale": noise(step)}}}
  return {"params": params, "ema": jax.tree.map(lambda x: x / 2, params), "step": jnp.int32(step)}


def write(workdir, steps, **options):
  ckpt = checkpoint.Checkpointer(epath.Path(workdir), **({"every": 2, "keep": 9} | options))
  for step in steps:
    assert ckpt.is_due(step)
    ckpt.save(step, make_state(step), {"micro_batches": 10 * step})
  ckpt.close()
  return Path(workdir) / "checkpoints"


def restore(workdir, like=None):
  ckpt = checkpoint.Checkpointer(epath.Path(workdir), 2, 9)
  try:
    return ckpt.restore(jax.eval_shape(lambda: like or make_state(0)), MESH)
  finally:
    ckpt.close()


def assert_is(found, step):
  state, data = found
  jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
  assert data == {"micro_batches": 10 * step}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A workdir with the checkpoints of updates 2 and 4."""
  workdir = tmp_path_factory.mktemp("written")
  write(workdir, (2, 4))
  return workdir


@pytest.fixture
def workdir(written, tmp_path):
  return Path(shutil.copytree(written, tmp_path / "workdir"))


def test_the_last_ones_and_every_so_many_are_kept(tmp_path):
  folder = write(tmp_path, range(2, 16, 2), keep=2, keep_every=6)
  assert sorted(int(path.name) for path in folder.iterdir()) == [6, 12, 14]
  for options in ({"every": 0}, {"keep": 0}, {"keep_every": 3}, {"keep_every": -2}):
    with pytest.raises(UserError, match=r"config\.checkpoint"):
      write(tmp_path, (), **options)


def test_a_checkpoint_is_due_once(tmp_path):
  ckpt = checkpoint.Checkpointer(epath.Path(tmp_path), 2, 9)
  assert [step for step in range(5) if ckpt.is_due(step)] == [2, 4] and ckpt.is_due(3, force=True)
  ckpt.save(2, make_state(2), {"micro_batches": 0})
  assert not ckpt.is_due(2) and not ckpt.is_due(2, force=True)
  ckpt.close()
  assert restore(tmp_path / "other") is None


@pytest.fixture
def timed():
  """Names of all that JAX and Orbax time from here on."""
  names = []
  listen = lambda name, *_, **__: names.append(name)
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


def test_saving_on_a_cpu_compiles_nothing(timed, tmp_path):
  """Leaves that every device has, in shapes that nothing else uses."""
  scale = lambda n: jax.device_put(np.ones(8 * n, np.float32), sharding.replicated(MESH))
  whole = {"params": {"scb": {f"norm{n}": {"scale": scale(n)} for n in range(1001, 1005)}}}
  timed.clear()
  checkpointer = checkpoint.Checkpointer(epath.Path(tmp_path), 1, 1)
  checkpointer.save(1, whole, {"micro_batches": 1})
  checkpointer.close()
  assert timed and not [name for name in timed if "backend_compile" in name]
  state, _ = restore(tmp_path, whole)
  jax.tree.map(np.testing.assert_array_equal, state, whole)
  jax.jit(lambda x: x + 7)(1.0)
  assert [name for name in timed if "backend_compile" in name]


# What can happen to a file of a checkpoint: bytes -> bytes, None: it is gone.
HARMS = {
  "gone": lambda data: None,
  "empty": lambda data: b"",
  "cut": lambda data: data[: len(data) // 2],
  "garbage": lambda data: bytes(len(data)),
  "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x55]) + data[len(data) // 2 + 1 :],
}


def harm(file, kind):
  data = HARMS[kind](file.read_bytes())
  file.unlink() if data is None else file.write_bytes(data)


@pytest.mark.parametrize("kind", HARMS)
def test_whatever_happens_to_a_file_no_wrong_value_comes_back(written, tmp_path, kind):
  """Each file of the newest checkpoint in turn: what is restored is exactly it, or exactly the one before."""
  names = sorted(path.relative_to(written) for path in (written / "checkpoints" / "4").rglob("*") if path.is_file())
  used = []
  for number, name in enumerate(names):
    copy = Path(shutil.copytree(written, tmp_path / str(number)))
    harm(copy / name, kind)
    found = restore(copy)
    used.append(int(found[0]["step"]))
    assert_is(found, used[-1])
    assert (copy / "checkpoints" / "4.damaged").exists() == (used[-1] == 2), name
  assert set(used) == {2, 4}  # some files matter, some don't


def lose_values(folder):
  for file in (folder / "state").glob("ocdbt.process_*/d/*"):
    harm(file, "empty")


BROKEN = {
  "values lost": lose_values,
  "no state": lambda folder: shutil.rmtree(folder / "state"),
  "no position": lambda folder: shutil.rmtree(folder / "data"),
  "garbage": lambda folder: (folder / "state" / "_METADATA").write_bytes(b"\xff\x00garbage"),
  "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_training_falls_back_to_the_one_before_and_can_save_again(workdir, kind, capfd):
  BROKEN[kind](workdir / "checkpoints" / "4")
  assert_is(restore(workdir), 2)
  said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("checkpoint ")]
  assert len(said) == 1 and "is damaged (" in said[0] and said[0].endswith("using that of update 2")
  write(workdir, (4,))
  assert_is(restore(workdir), 4)
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4", "4.damaged"}
  BROKEN[kind](workdir / "checkpoints" / "4")
  assert_is(restore(workdir), 2)
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4.damaged", "4.damaged1"}


def test_readers_fall_back_too_and_change_nothing(workdir, capfd):
  lose_values(workdir / "checkpoints" / "4")
  for kind, factor in (("ema", 0.5), ("raw", 1)):
    leaves = checkpoint.load_trained(workdir, kind)
    np.testing.assert_array_equal(
      leaves["scb/norm/scale"], factor * np.asarray(make_state(2)["params"]["scb"]["norm"]["scale"])
    )
    assert "4 is damaged" in capfd.readouterr().err
  (workdir / "checkpoints" / "4" / "state" / "_METADATA").unlink()
  step, leaves = checkpoint.stored(workdir)
  assert step == 2 and leaves["params/scb/norm/scale"].shape == (5000,)
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4"}


def test_without_a_whole_one_nothing_is_moved(workdir):
  for step in ("2", "4"):
    lose_values(workdir / "checkpoints" / step)
  for use in (restore, checkpoint.load_trained):
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(4: .*; 2: "):
      use(workdir)
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4"}


def test_what_another_process_cannot_read_is_damaged_for_all(workdir, monkeypatch, capfd):
  """And what takes all processes, verifying, isn't begun: the other one would be missing."""
  verified, votes = [], iter([4, 1, 1, 2, 0, 0])  # newest step, has anybody not read it, or not verified it; twice
  monkeypatch.setattr(checkpoint.distributed, "highest", lambda number: next(votes))
  read = lambda folder: ({"step": folder.name}, {})
  found = checkpoint._newest_whole(epath.Path(workdir / "checkpoints"), read, lambda leaves, _: verified.append(leaves["step"]))
  assert found == (2, ({"step": "2"}, {}), [4]) and verified == ["2"]
  assert "4 is damaged (another process can't read it)" in capfd.readouterr().err


def test_weights_that_are_not_finite_are_neither_saved_nor_restored(workdir, monkeypatch, capfd):
  bad = make_state(6)
  bad["ema"]["scb"]["norm"]["scale"] = bad["ema"]["scb"]["norm"]["scale"].at[7].set(jnp.nan)
  ckpt = checkpoint.Checkpointer(epath.Path(workdir), 2, 9)
  with pytest.raises(UserError, match=r"after update 6 ema/scb/norm/scale isn't finite: not saved"):
    ckpt.save(6, bad, {"micro_batches": 60})
  digest = checkpoint._digest  # as an earlier version, or another program, would have saved it
  monkeypatch.setattr(
    checkpoint, "_digest", lambda leaves: {name: (value, True) for name, (value, _) in digest(leaves).items()}
  )
  ckpt.save(6, bad, {"micro_batches": 60})
  ckpt.close()
  monkeypatch.undo()
  assert_is(restore(workdir), 4)
  assert "6 is damaged (ema/scb/norm/scale isn't finite)" in capfd.readouterr().err


def test_the_checksums_of_hosts_and_devices_are_the_same():
  """A pod's checkpoint opens on a workstation, whichever way each reckons; float32, bfloat16, int32, sharded, transposed."""
  values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
  mesh = sharding.make_mesh({"data": 8})
  leaves = {
    "float32": jax.device_put(values, sharding.batch_sharding(mesh)),
    "transposed": jnp.asarray(values).T,
    "bfloat16": jnp.asarray(-values, jnp.bfloat16),
    "int32": jnp.int32(-4),
    "nan": jnp.array([1, jnp.nan]),
  }
  host, device = checkpoint._digest(leaves), jax.device_get(checkpoint._device_digest(leaves))
  assert host == device and {name for name, (_, finite) in host.items() if not finite} == {"nan"}
  other = leaves | {"float32": jnp.asarray(values).at[3, 4].add(1e-6)}
  assert checkpoint._digest(other)["float32"] != host["float32"]


def test_a_checkpoint_of_another_state_names_the_first_leaf_that_differs(workdir):
  more, less = make_state(0), make_state(0)
  more["params"]["scb"]["extra"] = {"bias": jnp.zeros(3)}
  del less["ema"]
  where = rf"checkpoint {workdir}/checkpoints/4 isn't of this run: "
  for like, message in (
    (more, r"params/scb/extra/bias is missing there, float32\[3\] here"),
    (less, r"ema/scb/norm/scale is float32\[5000\] there, missing here"),
    (make_state(0, rows=4), r"ema/scb/norm/scale is float32\[5000\] there, float32\[4\] here"),
  ):
    with pytest.raises(UserError, match=where + message):
      restore(workdir, like)
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4"}


def test_trouble_outside_the_checkpoint_is_not_taken_for_damage(workdir, monkeypatch):
  def fail(*args):
    raise PermissionError(errno.EACCES, "not allowed")

  monkeypatch.setattr(checkpoint, "_metadata", fail)
  with pytest.raises(PermissionError):
    restore(workdir)
  assert (workdir / "checkpoints" / "4").exists()


def test_what_a_killed_run_left_half_written_goes(workdir):
  half = workdir / "checkpoints" / "6.orbax-checkpoint-tmp-1"
  shutil.copytree(workdir / "checkpoints" / "4", half)
  (half / "commit_success.txt").unlink()
  assert checkpoint.stored(workdir)[0] == 4 and half.exists()
  assert_is(restore(workdir), 4)
  write(workdir, (6,))
  assert not half.exists() and checkpoint.stored(workdir)[0] == 6


@pytest.fixture
def small_disk(tmp_path):
  """A disk of its own, of 1 MB; where none can be mounted, None."""
  disk = tmp_path / "disk"
  disk.mkdir()
  done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
  yield disk if done.returncode == 0 else None
  if done.returncode == 0:
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(small_disk, tmp_path, monkeypatch):
  workdir = small_disk or tmp_path / "run"
  write(workdir, (2,))
  ckpt = checkpoint.Checkpointer(epath.Path(workdir), 2, 9)
  if small_disk:
    room = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(room.f_bavail * room.f_frsize - 40_000))
  else:  # without the right to mount: the write fails as on a full disk
    full = lambda *args, **options: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(ckpt._manager, "save", full)
  with pytest.raises(UserError, match=r"couldn't be written, the disk is full. The ones before are whole"):
    ckpt.save(4, make_state(4), {"micro_batches": 40})
    ckpt.close()
  if small_disk:
    (small_disk / "other").unlink()
  assert_is(restore(workdir), 2)
  write(workdir, (4,))
  assert_is(restore(workdir), 4)


def test_a_full_disk_for_any_other_file_is_a_message_too(capsys):
  def fail():
    raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

  with pytest.raises(SystemExit) as end:
    run_command(fail)
  assert end.value.code == 2 and "error: metrics.jsonl can't be written: No space left" in capsys.readouterr().err


def test_texts_are_replaced_whole(tmp_path, monkeypatch):
  file = tmp_path / "config.json"
  atomic.write_text(file, "old")
  monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))  # a kill just before
  with pytest.raises(KeyboardInterrupt):
    atomic.write_text(file, "new")
  assert file.read_text() == "old"
  monkeypatch.undo()
  atomic.write_text(file, "new")
  assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def config_json(init="some/model"):
  return to_json(load_config("configs/align.py:tiny", [f"init={init}"]))


def test_a_damaged_config_is_a_user_error(tmp_path):
  file = tmp_path / "config.json"
  for text in (b'{"init": "ti', b"", b"\xff\xfe", b"[]", b"{}"):
    file.write_bytes(text)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    for use in (lambda: checkpoint.check_config(epath.Path(tmp_path), config_json()), lambda: load_model(tmp_path)):
      with pytest.raises(UserError, match=r"config\.json can't be read \(.*Bring back a copy"):
        use()


def test_a_workdir_of_a_version_without_a_key_goes_on_where_the_key_is_off(tmp_path):
  values = json.loads(config_json("tiny"))
  del values["data"]["image_size"]
  (tmp_path / "config.json").write_text(json.dumps(values))
  checkpoint.check_config(epath.Path(tmp_path), config_json("tiny"))
  larger = to_json(load_config("configs/align.py:tiny", ["init=tiny", "data.image_size=96"]))
  with pytest.raises(UserError, match=r"data\.image_size: None there, 96 now"):
    checkpoint.check_config(epath.Path(tmp_path), larger)


def test_a_workdir_records_where_its_model_is(tmp_path, monkeypatch):
  """As a whole path: it may be opened, and named again, from anywhere; "tiny" and object stores stay as they are."""
  workdir, other = epath.Path(tmp_path / "run"), tmp_path / "elsewhere"
  workdir.mkdir()
  (other / "deep").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "some").mkdir()
  root = Path(__file__).parent.parent
  texts = {}
  for init in ("some/model", "../../some/model", "tiny", "gs://some/model"):
    texts[init] = to_json(load_config(f"{root}/configs/align.py:tiny", [f"init={init}"]))
  recorded = lambda init: json.loads(checkpoint.recorded(texts[init]))["init"]
  assert recorded("some/model") == str(tmp_path / "some" / "model")
  assert recorded("tiny") == "tiny" and recorded("gs://some/model") == "gs://some/model"
  (workdir / "config.json").write_text(checkpoint.recorded(texts["some/model"]))
  checkpoint.check_config(workdir, texts["some/model"])
  monkeypatch.chdir(other / "deep")
  checkpoint.check_config(workdir, texts["../../some/model"])
  with pytest.raises(UserError, match=r"init: .*If the model that it started from was moved, write its new place as init into"):
    checkpoint.check_config(workdir, texts["some/model"])
  write(workdir, (2,))
  with pytest.raises(UserError, match=r"some/model', isn't there: no such folder.*--base"):
    load_model(workdir)
