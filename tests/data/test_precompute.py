"""Precomputed data gives what encoding in the loop gives; it goes on where it was cut off, and says when it doesn't fit."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load as load_arrays

from deepgen_jax import sharding, train
from deepgen_jax.config import load_config
from deepgen_jax.data import encoded, precompute
from deepgen_jax.data.sources import Filtered, Filters, ImageFolder, Sample
from deepgen_jax.errors import UserError
from deepgen_jax.models.config import SIZES
from deepgen_jax.stages import supervised
from deepgen_jax.stages.encode import ImageEncoder, encode_batch
from tests import xla
from tests.data.formats.pictures import picture
from tests.small import CONFIG, draw_params, save_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A base; pictures, one of them broken and one too narrow; edits with one and two references of several sizes."""
  root = tmp_path_factory.mktemp("precompute")
  save_model(root / "base", draw_params(), ("vlm", "dit", "vae"))
  (root / "cats").mkdir()
  for n in range(10):
    data = b"broken" if n == 3 else picture(n, 64, 700 if n == 5 else 64)
    (root / "cats" / f"{n}.png").write_bytes(data)
    (root / "cats" / f"{n}.txt").write_text(f"cat {n}")
  shapes = [(64, 64), (64, 96), (50, 50)]  # two sizes to compile
  for n in range(12):
    (root / f"{n}.png").write_bytes(picture(n, *shapes[n % 3]))
  edits = [
    {
      "input_image": [f"{n}.png", f"{n + 1}.png"][: 1 + n % 2],
      "output_image": f"{(n + 5) % 12}.png",
      "instruction": f"edit {n}",
    }
    for n in range(6)
  ]
  (root / "edits.json").write_text(json.dumps(edits))
  return root


@pytest.fixture(scope="module", autouse=True)
def small():
  """The small model in the place of `tiny`, on one device: what several do is for the loop's own tests."""
  make_mesh, one = sharding.make_mesh, jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(SIZES, "tiny", CONFIG)
    patch.setattr(sharding, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, one))
    yield


def settings(root):
  small = {
    "init": root / "base",
    "data.sources": f"folder:{root}/cats,json:{root}/edits.json",
    "data.pattern": "edit,generate",
    "data.batch_size": 4,
    "data.text_buckets": "(256,)",
    "data.max_bad_share": 0.2,
    "data.dir": root / "data",
    "unroll": "false",
    "eval.every": 0,
    "log.every": 1,
    "steps": 2,
  }
  return [f"{key}={value}" for key, value in small.items()]


def load(root, *overrides):
  return load_config("configs/align.py:tiny", [*settings(root), *overrides])


@pytest.fixture(scope="module")
def whole(root, small):
  """Everything precomputed, by two processes one after the other."""
  for part in range(2):
    precompute.precompute(load(root), epath.Path(root / "encoded"), (part, 2), 4)
  return root / "encoded"


def files(folder):
  """SOURCE/FILE of all there is."""
  kind = lambda path: "cats" if "cats-" in path.parent.name else "edits"
  return sorted(f"{kind(path)}/{path.name}" for path in Path(folder).rglob("*") if path.is_file())


def test_what_is_written(whole):
  assert files(whole) == [
    "cats/00000-of-00003.array_record",
    "cats/00000-of-00003.bad_samples.jsonl",
    "cats/00001-of-00003.array_record",
    "cats/00001-of-00003.bad_samples.jsonl",
    "cats/00002-of-00003.array_record",
    "cats/source.json",
    "edits/00000-of-00002.array_record",
    "edits/00001-of-00002.array_record",
    "edits/source.json",
  ]


@pytest.mark.parametrize("cache", [0, 100])
def test_batches_are_those_of_encoding_in_the_loop(root, whole, cache):
  """Texts, dropout and replaced samples too. With a cache, where images are encoded one by one, to the last bit; without, the
  rows of a program's batch round in their own ways.
  """
  made, reports = [], []
  for options in ([], [f"data.precomputed={whole}"]):
    config = load(root, *options, f"data.cache_images={cache}", "data.caption_dropout=0.3")
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sizes, params, tokenizer = supervised.load_base(config, mesh)
    model = supervised.make_model(config, sizes)
    batches = supervised.micro_batches(config, sizes, tokenizer, mesh, params)
    encoder = ImageEncoder(model, cache=cache, mesh=mesh)
    if options:  # which then is never asked to run
      encoder.programs = {}
    hosts = [batches.batch(m) for m in range(6)]
    made.append([encode_batch(model, params, encoder, host, 16, model.scale) for host in hosts])
    reports.append(([host["texts"] for host in hosts], batches.bad_samples(), batches.counts()))
  assert reports[0] == reports[1]
  assert [(bad.index, bad.filter) for bad in reports[1][1]] == [(3, ""), (5, "max_aspect")]
  assert any("" in texts for texts in reports[1][0])
  close = np.testing.assert_array_equal if cache else lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5)
  for one, other in zip(*made, strict=True):
    jax.tree.map(close, one, other)


def test_training_has_the_same_losses(root, whole, tmp_path):
  rows = []
  for name, options in (("loop", []), ("encoded", [f"data.precomputed={whole}"])):
    train.train(load(root, "data.pattern=edit", *options), epath.Path(tmp_path / name))
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    rows.append([{key: row[key] for key in ("step", "loss", "grad_norm")} for row in map(json.loads, lines)])
  assert len(rows[0]) == 2 and rows[0] == rows[1]


def test_it_goes_on_where_it_was_cut_off(root, whole, tmp_path, monkeypatch):
  """In the middle of the third file; what a killed process left behind goes away."""
  config, out = load(root), epath.Path(tmp_path / "encoded")
  write, written = precompute.write_shard, []

  def cut(file, items, encode, window, share):
    def fail(*args):
      raise KeyboardInterrupt

    written.append(file.name)
    return write(file, items, fail if len(written) == 3 else encode, window, share)

  monkeypatch.setattr(precompute, "write_shard", cut)
  with pytest.raises(KeyboardInterrupt):
    precompute.precompute(config, out, None, 4)
  (folder,) = out.glob("*cats-*")
  assert [file.name for file in sorted(folder.glob("*.array_record"))] == written[:2]
  left = folder / f".{written[2]}.1234"
  left.write_bytes(b"half")
  with pytest.raises(UserError, match=r"1 of 3 shards of folder:.*cats are missing"):
    supervised.build(load(root, f"data.precomputed={out}"), sharding.make_mesh(config.mesh.to_dict()))
  before = {file: file.stat().mtime for file in folder.glob("*.array_record")}
  monkeypatch.setattr(precompute, "write_shard", write)
  precompute.precompute(config, out, None, 4)
  assert files(out) == files(whole) and not left.exists()
  assert before == {file: file.stat().mtime for file in before}
  for file in out.glob("*/*.array_record"):
    assert file.read_bytes() == (whole / file.relative_to(out)).read_bytes()


# The command, with the small model in the place of `tiny`.
COMMAND = """
from deepgen_jax.data import precompute
from deepgen_jax.errors import run_command
from deepgen_jax.models.config import SIZES
from tests.small import CONFIG
SIZES["tiny"] = CONFIG
run_command(precompute.main)
"""


def test_processes_of_one_run_share_the_work(root, whole, tmp_path):
  """Two of two devices, which share the weights: their sums round in their own ways."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    place = f"localhost:{free.getsockname()[1]}/2"
  command = [sys.executable, "-c", COMMAND, "--config", "configs/align.py:tiny", "--output", str(tmp_path)]
  command += ["--shard_size", "4", *(f"--config.{setting}" for setting in settings(root))]
  command.append(f"--config.data.sources=folder:{root}/cats")
  start = lambda index: subprocess.Popen(
    [*command, f"--config.distributed={place}/{index}"],
    cwd=Path(__file__).parents[2],
    env=os.environ | {"XLA_FLAGS": xla.flags(2)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  processes = [start(index) for index in range(2)]
  try:
    said = [process.communicate(timeout=240)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], said
  assert "2 of 3 shards to do (part 0/2)" in said[0] and "1 of 3 shards to do (part 1/2)" in said[1]
  assert files(tmp_path) == [file for file in files(whole) if file.startswith("cats")]
  for ours in tmp_path.glob("*/*"):
    theirs = whole / ours.relative_to(tmp_path)
    if theirs.suffix != ".array_record":
      assert ours.read_bytes() == theirs.read_bytes()
      continue
    for one, two in zip(*(ArrayRecordReader(str(file)).read_all() for file in (ours, theirs)), strict=True):
      one, two = load_arrays(one), load_arrays(two)
      assert one.pop("json").tobytes() == two.pop("json").tobytes()
      for name in one.keys() | two.keys():
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-4 * np.abs(two[name]).max(), err_msg=name)


@pytest.fixture(scope="module")
def facts():
  """Of the base, as a training finds them."""
  return encoded.encoder_facts(draw_params(), 64, np.float32, Filters())


def source_of(root, whole, facts, entry=None, length=10):
  """The precomputed pictures, as a training would open them."""
  source = ImageFolder(root / "cats")
  source.names = source.names[:length]
  return encoded.Precomputed(source, whole, entry or {"uri": f"folder:{root}/cats"}, facts)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"length": 9}, "10 samples were precomputed of folder:.*cats, which now has 9; delete the folder and run python -m"),
    ({"weights": "other"}, "isn't for this config: config.init has another VAE or vision tower. Use the config"),
    ({"image_size": 96}, "for images of 64 pixels, not 96"),
    ({"dtype": "bfloat16"}, "computed in float32, not bfloat16"),
    ({"filters": {}}, r"with filters .*'max_aspect': 10.0.*, not \{\}"),
    ({"entry": {"uri": "folder:elsewhere"}}, "holds nothing of the data source folder:.*--output .*encoded with this run's"),
  ],
)
def test_what_does_not_fit(root, whole, facts, change, message):
  options = {name: change[name] for name in ("entry", "length") if name in change}
  assert len(source_of(root, whole, facts)) == 10
  with pytest.raises(UserError, match=message):
    source_of(root, whole, facts if options else facts | change, **options)


def test_damage(root, whole, facts, tmp_path):
  copy = epath.Path(tmp_path / "encoded")
  shutil.copytree(whole, copy)
  (folder,) = copy.glob("*cats-*")
  first, second, third = sorted(folder.glob("*.array_record"))
  first.write_bytes(third.read_bytes())
  data = np.frombuffer(second.read_bytes(), np.uint8).copy()
  used = np.flatnonzero(data)  # most of the file is padding
  data[used[len(used) // 4] : used[len(used) // 2]] ^= 255
  second.write_bytes(data.tobytes())
  source = source_of(root, copy, facts)
  with pytest.raises(UserError, match=r"00000-of-00003.array_record is cut short: delete it"):
    source[0]
  with pytest.raises(UserError, match=r"record \d of .*00001-of-00003.array_record can't be read"):
    [source[i] for i in (4, 6, 7)]
  third.unlink()
  with pytest.raises(UserError, match=r"1 of 3 shards of folder:.* are missing, the first: .*00002-of-00003"):
    source_of(root, copy, facts)
  (folder / "source.json").write_text("{")
  with pytest.raises(UserError, match=r"source.json can't be read .*; delete .*cats-"):
    source_of(root, copy, facts)


def test_data_that_is_broken_as_a_whole_is_not_written_down(root, tmp_path):
  (tmp_path / "cats").mkdir()
  for n in range(10):
    (tmp_path / "cats" / f"{n}.png").write_bytes(picture(n) if n > 1 else b"")
    (tmp_path / "cats" / f"{n}.txt").write_text("cat")
  config = load(root, f"data.sources=folder:{tmp_path}/cats", "data.max_bad_share=0.01")
  with pytest.raises(UserError, match=r"2 of samples 0 to 9 are broken, more than the share of 0.01.*data.max_bad_share"):
    precompute.precompute(config, epath.Path(tmp_path / "out"))
  assert not list((tmp_path / "out").rglob("*.array_record"))


def test_a_record_keeps_every_bit():
  rng = np.random.default_rng(0)
  wide = rng.normal(size=(4, 6, 16)).astype(np.float32)
  narrow = wide.astype(ml_dtypes.bfloat16)
  target = encoded.EncodedImage((70, 80, 3), 32, 48, (wide, narrow.astype(np.float32)))
  reference = encoded.EncodedImage((9, 9, 3), 32, 32, (wide, wide), (narrow,))
  sample = Sample("edit", ("a", "b é"), target, (reference,), "reply")
  record = encoded.pack(sample)
  again = encoded.unpack(record)
  assert (again.task, again.texts, again.answer) == (sample.task, sample.texts, sample.answer)
  for one, other in zip((target, reference), (again.target, *again.references)):
    assert (one.shape, one.height, one.width) == (other.shape, other.height, other.width)
    for a, b in zip((*one.moments, *one.features), (*other.moments, *other.features), strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)
  assert len(record) < 3 * wide.nbytes + 2 * narrow.nbytes + 2000
  with pytest.raises(Filtered, match="too long") as error:
    encoded.unpack(encoded.pack_error(Filtered("max_text", "too long")))
  assert error.value.filter == "max_text"
  with pytest.raises(UserError, match="broken"):
    encoded.unpack(encoded.pack_error(OSError("broken")))


def test_the_digest_is_of_values_in_their_places():
  params = {"a": np.arange(16, dtype=np.float32).reshape(8, 2)}
  digest = encoded.weights_digest(params)
  eight = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
  assert encoded.weights_digest(jax.device_put(params, eight)) == digest
  swapped = {"a": params["a"][::-1].copy()}
  changed = {"a": np.nextafter(params["a"], 99, dtype=np.float32)}
  assert len({digest, encoded.weights_digest(swapped), encoded.weights_digest(changed)}) == 3


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--output", "x", "--shard", "2/2"], "--shard 2/2: write INDEX/COUNT"),
    (["--output", "x", "--shard_size", "0"], "--shard_size 0: must be at least 1"),
    (["--outptu", "x", "--output", "y"], "unknown option '--outptu'. Did you mean '--output'"),
  ],
)
def test_mistakes(argv, message, monkeypatch):
  monkeypatch.setattr("sys.argv", ["precompute", "--config", "configs/align.py:tiny", *argv])
  with pytest.raises(UserError, match=message):
    precompute.main()
