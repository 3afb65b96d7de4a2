"""The benchmark command: its fields, its arithmetic, its mistakes."""

import importlib.util
import json
import shutil
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from deepgen_jax import benchmark
from deepgen_jax.benchmarking import full, torch_process
from deepgen_jax.config import load_config
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.models.config import SIZES as SIZES_BY_NAME
from tests import small
from tests.benchmarking.test_cases import SIZES

FIELDS = {"name", "ours_ms", "torch_eager_ms", "torch_fast_ms", "torch_compile_ms", "ratio", "ratio_compile", "max_rel_error"}


@pytest.fixture
def run(monkeypatch, capsys):
  """run(*arguments) -> (exit code, standard output, standard error) of the command on tiny sizes, not pinned to a core."""

  def run(*arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    monkeypatch.setattr(benchmark, "CPU", SIZES)
    monkeypatch.setattr(benchmark, "pin", lambda threads: [0])
    with pytest.raises(SystemExit) as end:
      run_command(benchmark.main)
    return end.value.code, *capsys.readouterr()

  return run


def test_one_line_of_json_a_case(run, monkeypatch):
  monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")  # pays from more kernels on than a small model has
  monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")  # without a trial of each instruction set that the processor names
  code, out, _ = run("vlm_prefill", "--json", "--rounds", "2")
  assert code == 0
  (record,) = map(json.loads, out.splitlines())
  assert record.keys() > FIELDS
  assert record["name"] == "vlm_prefill" and record["notes"] == []
  assert all(record[f"{side}_ms"] > 0 for side in ("ours", "torch_eager", "torch_fast", "torch_compile"))
  assert record["ratio"] == pytest.approx(record["ours_ms"] / min(record["torch_eager_ms"], record["torch_fast_ms"]), 1e-2)
  assert record["ratio_compile"] == pytest.approx(record["ours_ms"] / record["torch_compile_ms"], 1e-2)
  assert 0 <= record["max_rel_error"] <= 1e-4
  assert {"jax", "torch", "diffusers", "transformers"} <= record["versions"].keys()
  assert (record["platform"], record["threads"], record["dtype"], record["clock"]) == ("cpu", 1, "float32", "wall")
  assert all(low <= record[f"{side}_ms"] <= high for side, (low, high) in record["spread_ms"].items())


def test_outputs_that_differ_stop_it(run, monkeypatch):
  """Before anything is timed: the error is a failure while running."""
  monkeypatch.setattr(benchmark, "alternate", lambda *_: pytest.fail("timed"))
  monkeypatch.setattr(benchmark, "FORWARD_TOLERANCE", 1e-12)
  with pytest.raises(RuntimeError, match="vlm_prefill: ours and PyTorch's outputs differ"):
    benchmark.compare_with_torch("vlm_prefill", SIZES, rounds=1, threads=1, clock="wall")


def test_alone():
  """What happens on a GPU or TPU."""
  record = benchmark.measure_alone(benchmark.build("vlm_prefill", SIZES)[0], rounds=2)
  assert record["ours_ms"] > 0 and record["torch_eager_ms"] is record["ratio"] is None
  assert "vlm_prefill" in benchmark.to_line({"name": "vlm_prefill", **record})


@pytest.mark.parametrize("name, images", [("full_edit", 4 * 2), ("full_sampler_1", 1)])
def test_full_programs(name, images, monkeypatch):
  """What a GPU or TPU runs at full size, here small and on a CPU whose peak is known."""
  monkeypatch.setitem(benchmark.PEAKS, "cpu", 1e12)
  monkeypatch.setattr(full, "STEPS", 2)
  monkeypatch.setitem(SIZES_BY_NAME, "tiny", small.CONFIG)
  config = load_config("configs/align.py:tiny", ["data.batch_size=2", "unroll=false", "dtype=bfloat16"])
  job = full.build(name, config, jax.devices()[:1])
  result = job.run()
  if name == "full_edit":  # an update was made, of random numbers that stay finite
    assert float(result["skipped"]) == 0 and float(result["grad_norm"]) > 0
  else:
    assert result[0].shape == (1, 64, 64, 3) and np.isfinite(result[0]).all() and np.std(result[0]) > 0
  record = benchmark.measure_alone(job, rounds=2)
  seconds = record["ours_ms"] / 1000
  assert record["images_per_s"] == pytest.approx(images / seconds)
  assert record["mfu"] == pytest.approx(record["model_tflops"] / seconds) and record["model_tflops"] > 1e-5
  assert "mfu" in benchmark.to_line({"name": name, **record})


@pytest.mark.parametrize(
  "config, overrides, message",
  [
    ("configs/grpo.py:tiny", [], "full_edit takes a config of stage 1 or 2"),
    ("configs/sft.py:tiny", ["data.batch_size=3"], "batch_size 3: it must be a positive multiple of the 8 devices"),
  ],
)
def test_configs_that_full_programs_refuse(config, overrides, message):
  with pytest.raises(UserError, match=message):
    full.build("full_edit", load_config(config, overrides))


def test_sides_take_turns():
  order = []
  side = lambda name: lambda: order.append(name) or {"wall": len(order), "cpu": 0.5}
  times = benchmark.alternate({name: side(name) for name in "abc"}, 4, "wall")
  assert "".join(order) == "abcbcacababc"
  assert times["a"] == [1000, 6000, 8000, 10000]
  assert benchmark.alternate({"a": side("a")}, 1, "cpu") == {"a": [500]}


def test_ratio_is_against_the_faster_eager():
  times = {"ours": [3.0, 2.0, 9.0], "torch_eager": [4.0, 4.0, 4.0], "torch_fast": [2.0, 1.0, 7.0]}
  summary = benchmark.summarise(times)
  assert (summary["ours_ms"], summary["ratio"], summary["ratio_compile"]) == (3, 1.5, None)
  assert summary["torch_compile_ms"] is None and summary["spread_ms"]["ours"] == [2, 9]
  assert benchmark.summarise({**times, "torch_fast": [8.0] * 3})["ratio"] == 0.75
  del times["torch_fast"]
  assert benchmark.summarise(times)["torch_fast_ms"] is None and benchmark.summarise(times)["ratio"] == 0.75


def test_relative_error():
  x = {"a": np.array([1.0, -2.0]), "b": np.array([1e-9])}
  assert benchmark.max_relative_error(x, x) == 0
  assert benchmark.max_relative_error({**x, "a": np.array([1.0, -1.9])}, x) == pytest.approx(0.05)
  assert benchmark.max_relative_error({**x, "b": np.array([2e-9])}, x) == pytest.approx(1e-9 / 2e-4)  # nothing but rounding
  assert benchmark.max_relative_error({**x, "a": np.array([1.0, np.nan])}, x) == np.inf
  with pytest.raises(ValueError, match="different things"):
    benchmark.max_relative_error({"a": x["a"]}, x)


def test_without_a_compiler(monkeypatch, tmp_path):
  assert torch_process.build_fast_sgemm(tmp_path).stat().st_size
  monkeypatch.setattr(shutil, "which", lambda _: None)
  assert torch_process.build_fast_sgemm(tmp_path) is None


def test_a_process_that_ends_early_says_why(tmp_path):
  with pytest.raises(torch_process.WorkerError, match=r"ended early(.|\n)*inputs"):
    torch_process.TorchProcess(tmp_path, "torch_eager", ["dit_forward"])


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["dit_forward_265"], "unknown case 'dit_forward_265'. Did you mean 'dit_forward_256'?"),
    (["--rounds", "0"], "--rounds 0: must be at least 1"),
    (["--threads", "999"], "--threads 999: this process may use"),
    (["full_edit"], "full_edit needs a GPU or TPU; here there is a CPU"),
    (["vlm_prefill", "--config.steps=3"], "--config is for the cases full_generate, full_edit"),
    (["--jsn"], "unknown option '--jsn'. Did you mean '--json'?"),
  ],
)
def test_mistakes(run, arguments, message):
  code, out, err = run(*arguments)
  assert (code, out) == (2, "") and message in err


def test_without_torch(run, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
  code, out, err = run("vlm_prefill")
  assert (code, out) == (2, "") and "torch can't be imported" in err and "deepgen_jax[test]" in err


def test_the_loader_s_stages(run, monkeypatch):
  """PyTorch has no part in it."""
  monkeypatch.setattr(benchmark, "check_torch", lambda: pytest.fail("asked for PyTorch"))
  monkeypatch.setattr(benchmark.data, "SIDE", 128)
  code, out, _ = run("data", "--json", "--rounds", "2", "--image_size", "64", "--images_per_s", "1000")
  (record,) = map(json.loads, out.splitlines())
  assert code == 0 and record["name"] == "data" and list(record["stages_ms"]) == list(benchmark.data.STAGES)
  assert all(value > 0 for value in record["stages_ms"].values())
  assert record["samples_per_s_per_core"] == pytest.approx(1000 / sum(record["stages_ms"].values()), rel=1e-2)
  assert record["cores_per_chip"] == pytest.approx(1000 / record["samples_per_s_per_core"], rel=1e-2)
  code, out, _ = run("data", "--rounds", "1", "--image_size", "64")
  assert code == 0 and "cores feed a chip at 10 images/s" in out
  code, _, err = run("data", "--images_per_s", "0")
  assert code == 2 and "--images_per_s 0.0: must be a positive number" in err
