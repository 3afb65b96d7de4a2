"""The report on small made-up results: what it writes, what it refuses."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from deepgen_jax import report
from deepgen_jax.errors import UserError
from deepgen_jax.reporting import page, results

pytest.importorskip("matplotlib")

STAGES = ("start", "align", "sft")
CAPTION = 'a <b>"bold"</b> price of $^$ & $6'  # "$^$" is an error in TeX


def scores(stage):
  value = (STAGES.index(stage) + 1) / 4
  shares = dict.fromkeys(("generation_r1", "generation_r5", "edit_r1", "edit_r5"), value)
  return shares | {
    "stage": stage,
    "heldout_loss": 1 - value,
    "edit_error_outside": 9.0 - value,
    "reward": value / 2,
    "sampler_steps": 20,
    "guidance": 4.0,
  }


def samples(stage, count=30):
  images = lambda seed: np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)
  made = 10 + STAGES.index(stage)
  return {
    "captions": np.array([CAPTION] + [f"caption {i}" for i in range(1, count)]),
    "instructions": np.array([f"make {i} red" for i in range(count)]),
    "true": images(0),
    "source": images(1),
    "edit_true": images(2),
    "generated": images(made),
    "edited": images(made + 10),
  }


def write_stage(root, stage, **changed):
  folder = root / "eval" / stage
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "scores.json").write_text(json.dumps(scores(stage)))
  np.savez(folder / "samples.npz", **(samples(stage) | changed))
  return folder


def write_run(root, name):
  (root / name).mkdir(parents=True)
  rows = [{"step": i, "loss": 1 / i, "lr": 0.1, "loss_scale": 7.0} for i in range(1, 6)]
  rows += [{"step": 5, "eval/heldout_loss": 0.5, "eval/heldout_edit_loss": 0.25, "eval/psnr": 20.0}]
  (root / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("quickstart")
  for stage in STAGES:
    write_stage(root, stage)
  for name in STAGES[1:]:
    write_run(root, name)
  return root


def arguments(root, output=None):
  words = ["--output", str(output or root)]
  words += [f"--stage={stage}={root / 'eval' / stage}" for stage in STAGES]
  return words + [f"--run={name}={root / name}" for name in STAGES[1:]]


def run(monkeypatch, words):
  monkeypatch.setattr("sys.argv", ["report", *map(str, words)])
  report.main()


@pytest.fixture(scope="module")
def written(root, tmp_path_factory):
  output = tmp_path_factory.mktemp("report") / "new"
  with pytest.MonkeyPatch.context() as monkeypatch:
    run(monkeypatch, arguments(root, output))
  return output


class Reader(html.parser.HTMLParser):
  """Collects what a page refers to, and checks that tags close in order."""

  def __init__(self, text):
    super().__init__()
    self.images, self.references, self.texts, self.open = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    if tag not in ("meta", "img", "link"):
      self.open.append(tag)
    self.references += [value for key, value in attrs if key in ("src", "href", "srcset")] + ([tag] if tag == "script" else [])
    if tag == "img":
      self.images.append(dict(attrs))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


def decode(source):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))))


def test_scores_are_a_list_in_the_order_of_the_stages(written):
  first, *others = json.loads((written / "scores.json").read_text())
  assert first == scores("start")
  changes = [dict(reward_before=0.125, reward_after=0.25), dict(reward_before=0.25, reward_after=0.375)]
  assert others == [scores(stage) | change for stage, change in zip(STAGES[1:], changes)]


def test_picture_is_a_png_that_shows_the_samples(written):
  with Image.open(written / "report.png") as image:
    assert image.format == "PNG" and image.width > 1000
    assert np.asarray(image.convert("RGB")).std() > 10


def test_page_is_whole_and_needs_nothing_from_outside(written):
  text = (written / "report.html").read_text()
  reader = Reader(text)
  assert reader.open == []
  assert all(reference.startswith("data:image/") for reference in reader.references)
  assert not re.search(r"url\(|@import|https?://", re.sub(r'src="data:[^"]*"', "", text))


def test_page_shows_every_stage_beside_the_true_image(written):
  images = [image for image in Reader((written / "report.html").read_text()).images if "svg" not in image["src"]]
  assert len(images) == page.CARDS * (4 + 5)  # true and three stages; source, true and three stages
  keys = [("start", "true"), ("start", "generated"), ("align", "generated"), ("sft", "generated")]
  for image, (stage, key) in zip(images, keys):
    np.testing.assert_array_equal(decode(image["src"]), samples(stage)[key][0])
  edits = [("start", "source"), ("start", "edit_true"), ("start", "edited"), ("align", "edited"), ("sft", "edited")]
  for image, (stage, key) in zip(images[4 * page.CARDS :], edits):
    np.testing.assert_array_equal(decode(image["src"]), samples(stage)[key][0])


def test_page_escapes_captions(written):
  text = (written / "report.html").read_text()
  reader = Reader(text)
  assert CAPTION in reader.texts and f"{CAPTION}: sft" in {image["alt"] for image in reader.images}
  assert "<b>bold" not in text.replace('"', "")


def test_page_shows_the_scores_and_marks_the_best(written):
  text = (written / "report.html").read_text()
  assert re.findall(r'<td class="best">([^<]*)', text) == ["75.0 %"] * 4 + ["0.2500", "8.2", "0.375"]  # all in the last row
  assert "25.0 % → 75.0 %" in text and "20 steps" in text


def test_reinforcement_learning_shows_its_reward(root, written):
  """Beside the losses of the other stages, and on a scale of its own."""
  (root / "grpo").mkdir()
  rows = [{"step": i, "loss": -0.1, "reward": 0.2 + i / 50} for i in range(1, 6)] + [{"step": 5, "eval/reward": 0.4}]
  (root / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  runs = [results.read_run(name, root / name) for name in ("align", "grpo")]
  assert set(runs[1].losses) == {"reward", "heldout_reward"} and runs[1].losses["reward"].shape == (5, 2)
  stages = [results.read_stage(name, root / "eval" / name) for name in STAGES]
  from matplotlib.figure import Figure

  from deepgen_jax.reporting import picture

  panels = Figure().subplots(1, 2)
  picture._loss_panels(panels, runs, stages)
  assert [panel.get_title("left") for panel in panels] == ["align: flow-matching loss", "grpo: reward"]
  assert len(panels[1].lines) == 2 and panels[1].get_ylim()[1] > 0.39


def test_losses_are_read_by_series(root):
  losses = results.read_run("align", root / "align").losses
  assert set(losses) == {"loss", "heldout_loss", "heldout_edit_loss"}
  np.testing.assert_allclose(losses["loss"], [(i, 1 / i) for i in range(1, 6)])


def test_a_single_stage_without_a_run(root, tmp_path, monkeypatch):
  run(monkeypatch, ["--output", tmp_path, "--stage", f"sft={root / 'eval' / 'sft'}"])
  assert "Loss curves" not in (tmp_path / "report.html").read_text()


def test_samples_are_spread_evenly():
  assert results.evenly(10, 5) == [0, 2, 4, 6, 8]
  assert results.evenly(3, 5) == [0, 1, 2]
  assert results.evenly(0, 5) == []


def test_other_numbers_in_metrics_and_non_finite_losses_do_no_harm(root, tmp_path, monkeypatch):
  workdir = write_run(tmp_path, "broken")
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "loss": NaN}\n')
  run(monkeypatch, ["--output", tmp_path, f"--run=sft={workdir}", f"--stage=sft={root / 'eval' / 'sft'}"])


@pytest.mark.parametrize(
  "words, message",
  [
    (["--stage", "sft"], "write --stage NAME=VALUE"),
    (["--stage", "=x"], "write --stage NAME=VALUE"),
    (["--stage", "a=x", "--stage", "a=y"], "'a' stands twice"),
    (["--stage", "a=x", "--stages", "b=y"], "'--stages'. Did you mean '--stage'"),
    (["--stage", "a=nowhere"], "nowhere/scores.json not found"),
  ],
)
def test_bad_arguments(words, message, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=message):
    run(monkeypatch, ["--output", tmp_path / "new", *words])
  assert not (tmp_path / "new").exists()


def test_bad_scores(tmp_path):
  folder = write_stage(tmp_path, "sft")
  for text in ("{", "[]", json.dumps(scores("sft") | {"edit_r1": "high"}), '{"stage": "sft"}'):
    (folder / "scores.json").write_text(text)
    with pytest.raises(UserError, match=r"stage sft: .*scores\.json"):
      results.read_stage("sft", folder)


def test_bad_samples(tmp_path):
  floats = samples("sft")["generated"].astype(np.float32)
  for changed in ({"generated": floats}, {"captions": np.array(["one"])}, {"captions": np.array([{}])}):
    with pytest.raises(UserError, match=r"stage sft: .*(generated|samples)"):
      results.read_stage("sft", write_stage(tmp_path, "sft", **changed))
  (tmp_path / "eval" / "sft" / "samples.npz").write_bytes(b"PK\3\4 cut short")
  with pytest.raises(UserError, match=r"samples\.npz can't be read"):
    results.read_stage("sft", tmp_path / "eval" / "sft")


def test_bad_runs(tmp_path):
  with pytest.raises(UserError, match="the --workdir of a training"):
    results.read_run("align", str(tmp_path))
  for text, message in (("", "holds no loss yet"), ('{"step": 1, "loss": 1}\n{"st', "line 2"), ('{"loss": 1}', "line 1")):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
      results.read_run("align", tmp_path)


def test_stages_must_have_seen_the_same_samples(root, tmp_path, monkeypatch):
  other = write_stage(tmp_path, "sft", instructions=np.array([f"other {i}" for i in range(30)]))
  with pytest.raises(UserError, match="start and sft differ in 'instructions'"):
    run(monkeypatch, ["--output", tmp_path / "new", f"--stage=start={root / 'eval' / 'start'}", f"--stage=sft={other}"])
  assert not (tmp_path / "new").exists()


def test_output_may_not_be_a_file(root, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UserError, match="is a file"):
    run(monkeypatch, arguments(root, tmp_path / "file"))
  assert (tmp_path / "file").read_text() == "mine"
