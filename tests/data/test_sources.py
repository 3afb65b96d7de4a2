import numpy as np
import pytest
from PIL import Image

from deepgen_jax.data import sources
from deepgen_jax.errors import UserError


def test_emoji_sources_hold_only_their_side(emoji):
  for held_out in (False, True):
    source = sources.EmojiGeneration(emoji, held_out)
    assert (emoji.held_out[source.indices] == held_out).all()
    sample = source[3]
    assert sample.texts == (emoji.captions[source.indices[3]],) and sample.target.shape == (64, 64, 3)
  edit = sources.EmojiEdits(emoji)[0]
  assert edit.task == "edit" and len(edit.references) == 1 and len(edit.texts) >= 3


def test_rendered_words():
  sample = sources.RenderedWords()[5]
  assert sample.texts[0].startswith('the word "') and sample.target.shape == (64, 64, 3)


@pytest.fixture
def folder(tmp_path):
  for name in "abcd":
    Image.new("RGB", (40, 30), "red").save(tmp_path / f"{name}.png")
    (tmp_path / f"{name}.txt").write_text(f"a red {name}\n")
  return tmp_path


def test_a_folder_of_images(folder):
  source = sources.ImageFolder(folder)
  assert len(source) == 4
  assert source[1].texts == ("a red b",) and source[1].target.shape == (30, 40, 3)
  with pytest.raises(UserError, match=r"no such file or folder: .*nowhere"):
    sources.ImageFolder(folder / "nowhere")
  (folder / "empty").mkdir()
  with pytest.raises(UserError, match=r"no images in .*unless you write folder:.*empty/\*\*"):
    sources.ImageFolder(folder / "empty")
  with pytest.raises(UserError, match=r"a\.png is no folder"):
    sources.ImageFolder(folder / "a.png")


def test_several_folders_of_images(folder):
  (folder / "deep" / "er").mkdir(parents=True)
  for name in ("a.png", "a.txt"):
    (folder / "deep" / "er" / name).write_bytes((folder / name.replace("a", "d")).read_bytes())
  both = sources.ImageFolder(f"{folder}/{{.,deep/er}}")
  assert [both[i].texts[0] for i in range(len(both))] == ["a red a", "a red b", "a red c", "a red d", "a red d"]
  assert len(sources.ImageFolder(f"{folder}/**")) == 5 and len(sources.ImageFolder(f"{folder}/deep/*")) == 1


def test_broken_samples_are_replaced_by_the_next_and_listed(folder):
  (folder / "b.png").write_bytes(b"no image")
  (folder / "c.txt").write_text(" \n")
  (folder / "d.txt").unlink()
  source = sources.Guarded(sources.ImageFolder(folder), max_bad_share=0.1)
  assert [source[i].texts for i in (1, 0, 3, 1)] == [("a red a",)] * 4
  bad = source.bad_samples()
  assert [b.index for b in bad] == [1, 2, 3]
  assert "b.png" in bad[0].reason and "empty" in bad[1].reason and "missing" in bad[2].reason
  with pytest.raises(UserError, match=r"11 of .* broken.*Mend the data"):
    for _ in range(20):
      source[1]


def test_captions_that_are_no_text_or_far_too_long(folder):
  (folder / "a.txt").write_bytes(b"caf\xe9")
  (folder / "b.txt").write_bytes(b"x" * (sources.MAX_CAPTION + 1))
  (folder / "c.txt").write_bytes("\ufeffcafé".encode())
  source = sources.ImageFolder(folder)
  with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text"):
    source[0]
  with pytest.raises(sources.Filtered, match=r"b\.txt: the text has 1048577 bytes") as error:
    source[1]
  assert error.value.filter == "max_text" and source[2].texts == ("café",)


def test_a_source_without_a_good_sample(folder):
  for name in "abcd":
    (folder / f"{name}.txt").unlink()
  with pytest.raises(UserError, match=r"4 samples in a row .* can't be used; the first: .*c\.png"):
    sources.Guarded(sources.ImageFolder(folder), max_bad_share=1.0)[2]


def test_what_cannot_be_used_is_broken_or_filtered():
  blank = lambda height, width: np.zeros((height, width, 3), np.uint8)
  filters = sources.Filters(min_side=32, max_text=10)
  check = lambda task, text, *images: sources.check(sources.Sample(task, (text,), images[0], images[1:]), filters)
  check("generate", "x" * 10, blank(32, 320))
  for filtered, text, image in [
    ("min_side", "x", blank(31, 40)),
    ("max_aspect", "x", blank(32, 321)),
    ("max_text", "x" * 11, blank(32, 32)),
  ]:
    with pytest.raises(sources.Filtered) as error:
      check("generate", text, image)
    assert error.value.filter == filtered
    if filtered != "max_text":
      with pytest.raises(sources.Filtered):
        check("edit", text, blank(32, 32), image)  # references too
  for message, task, text in [("empty", "generate", " "), ("0 reference", "edit", "x")]:
    with pytest.raises(UserError, match=message) as error:
      check(task, text, blank(32, 32))
    assert not isinstance(error.value, sources.Filtered)


def test_filtered_samples_are_counted_by_filter_and_do_not_stop_the_run(folder):
  Image.new("RGB", (20, 30)).save(folder / "a.png")
  Image.new("RGB", (300, 29)).save(folder / "b.png")
  (folder / "c.txt").write_text("x" * 9000)
  source = sources.Guarded(sources.ImageFolder(folder), 0.0, sources.Filters(min_side=25))
  for _ in range(200):
    assert source[0].texts == source[3].texts == ("a red d",)
  source[1], source[2]
  assert source.counts() == {"drawn": 402, "broken": 0, "filtered": {"max_aspect": 1, "max_text": 1, "min_side": 200}}
  assert [(b.index, b.filter) for b in source.bad_samples()] == [(0, "min_side"), (1, "max_aspect"), (2, "max_text")]


def test_the_list_of_bad_samples_is_bounded(folder, monkeypatch):
  monkeypatch.setattr(sources, "LISTED", 2)
  for name in "abc":
    (folder / f"{name}.txt").unlink()
  source = sources.Guarded(sources.ImageFolder(folder), 1.0)
  assert source[0].texts == ("a red d",)
  assert [b.index for b in source.bad_samples()] == [0, 1]
