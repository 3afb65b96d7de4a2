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
  with pytest.raises(UserError, match="no such image folder"):
    sources.ImageFolder(folder / "nowhere")
  (folder / "empty").mkdir()
  with pytest.raises(UserError, match="no images in"):
    sources.ImageFolder(folder / "empty")


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


def test_a_source_without_a_good_sample(folder):
  for name in "abcd":
    (folder / f"{name}.txt").unlink()
  with pytest.raises(UserError, match=r"every sample .* is broken; the first: .*c\.png"):
    sources.Guarded(sources.ImageFolder(folder), max_bad_share=1.0)[2]


def test_narrow_images_and_blank_texts_are_broken():
  image = np.zeros((32, 32, 3), np.uint8)
  sources.check(sources.Sample("generate", ("x",), image))
  with pytest.raises(UserError, match="too narrow"):
    sources.check(sources.Sample("generate", ("x",), np.zeros((8, 81, 3), np.uint8)))
  with pytest.raises(UserError, match="empty"):
    sources.check(sources.Sample("generate", ("",), image))
  with pytest.raises(UserError, match="0 reference"):
    sources.check(sources.Sample("edit", ("x",), image))
