"""The data that the tiny base is trained on: nothing held out enters, and batches follow from their number alone."""

import numpy as np
import pytest

from configs import pretrain_tiny
from deepgen_jax.data import words
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration, RenderedWords
from deepgen_jax.stages import pretrain_dit, pretrain_vae, pretrain_vlm
from deepgen_jax.stages.pretrain_dit import MAX_WORDS, Data, Vocabulary, split, spread


class Places:
  """Latents that say which image they are of."""

  def __init__(self, emoji):
    written = words.combinations(held_out=False)
    self.words = [written[i] for i in np.random.default_rng(0).choice(len(written), pretrain_dit.WORDS, replace=False)]
    self.mean = np.arange(len(emoji) + len(self.words))
    self.logvar = -self.mean
    self.layout = np.random.default_rng(1).standard_normal((len(self.mean), 16, 3))


@pytest.fixture(scope="module")
def data(emoji):
  return Data(pretrain_tiny.get_config("dit"), emoji, Places(emoji), 64)


def test_split_spells_quoted_words():
  assert split('the word "UP" in light-blue') == ["the", "word", '"U', '"P', "in", "light", "blue"]
  assert split("") == []


def test_vocabulary_pads_cuts_and_knows_what_it_does_not_know():
  vocabulary = Vocabulary(["red apple", "green apple"])
  ids, mask = vocabulary(["red pear", "", "apple " * 40])
  assert len(vocabulary) == 4 and ids.shape == mask.shape == (3, MAX_WORDS + 1)
  assert ids[0].tolist() == [0, 3, 0] + [0] * (MAX_WORDS - 2) and mask[0].sum() == 3
  assert mask[1].sum() == 1 and mask[2].all() and (ids[2, 1:] == 1).all()


def test_context_slots_hold_all_that_is_shown_and_nothing_hidden():
  shown = np.array([[1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0], [1] * 6], bool)
  for seed in range(20):
    dealt = spread(shown, 20, np.random.default_rng(seed))
    for row, count in enumerate(shown.sum(1)):
      slots = dealt["slots"][row][dealt["slot_mask"][row]]
      assert set(slots) - {shown.shape[1]} == set(np.flatnonzero(shown[row])) and len(slots) >= count
      np.testing.assert_array_equal(slots[:count], np.flatnonzero(shown[row]))
  counts = np.concatenate([spread(shown, 20, np.random.default_rng(i))["slot_mask"].sum(1) for i in range(40)])
  assert counts.max() == 20 and len(set(counts)) > 10
  spare = np.concatenate([spread(shown, 20, np.random.default_rng(i))["slots"][:, 6:].ravel() for i in range(40)])
  assert 0.6 < (spare == shown.shape[1]).mean() < 0.9  # most say nothing


def test_dit_batches_hold_nothing_held_out(data, emoji):
  """A generation shows its own caption; an edit leads from a training image to a training image."""
  tasks, found = set(), []
  for m in range(60):
    batch = data.draw(m, 32)
    tasks.add("reference" in batch)
    for key in ("mean", "reference"):
      drawn = batch.get(key, np.zeros(0, int))
      assert not emoji.held_out[drawn[drawn < len(emoji)]].any()
    if "reference" in batch:
      assert (batch["reference"] < len(emoji)).all() and (batch["reference"] != batch["mean"]).all()
    else:
      ids, _ = data.vocabulary([emoji.captions[i] if i < len(emoji) else "" for i in batch["mean"]])
      shown = (batch["ids"] != 0).any(1) & (batch["mean"] < len(emoji))  # not dropped
      assert 0 < shown.mean() < 0.6
      np.testing.assert_array_equal(batch["ids"][shown], ids[shown])
    told = batch["layout"].any(1)
    found.append(told.mean())
    there = data._latents.layout[batch["reference"]] if "reference" in batch else 0
    truth = data.told(data._latents.layout[batch["mean"]] - there)
    slope = (batch["layout"] * truth)[told].sum() / np.square(truth)[told].sum()
    assert batch["layout"].dtype == np.float32 and 0.2 < slope < 1
  assert tasks == {True, False}
  assert np.mean(found) == pytest.approx(0.8, abs=0.03)  # the rest has words alone, or nothing
  repeated = data.draw(7, 32)
  assert all(np.array_equal(repeated[key], value) for key, value in data.draw(7, 32).items())


def test_held_out_captions_use_known_words(data, emoji):
  """What is held out can be recombined: no word of it is new."""
  ids, mask = data.vocabulary([emoji.captions[i] for i in np.flatnonzero(emoji.held_out)])
  assert (ids[:, 1:][mask[:, 1:]] > 0).all()


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_dialogues_sketch_training_images(task, emoji):
  source = EmojiEdits(emoji) if task == "edit" else EmojiGeneration(emoji)
  dialogues = pretrain_vlm.Dialogues(source)
  assert len(dialogues) == len(source) and dialogues.task == task
  for i in range(0, len(dialogues), 97):
    sample, original = dialogues[i], source[i]
    assert sample.answer == pretrain_vlm.sketch(original.target) and sample.texts == original.texts
    assert len(sample.references) == len(original.references)


def test_dialogues_describe_with_training_captions(emoji):
  source = EmojiGeneration(emoji)
  dialogues = pretrain_vlm.Dialogues(source, describe=True)
  held_out = {emoji.captions[i] for i in np.flatnonzero(emoji.held_out)}
  for i in range(0, len(dialogues), 97):
    sample = dialogues[i]
    assert sample.task == dialogues.task == "edit" and sample.answer == source[i].texts[0] not in held_out
    np.testing.assert_array_equal(sample.references[0], source[i].target)


def test_a_sketch_names_the_nearest_colours():
  image = np.full((64, 64, 3), 255, np.uint8)
  image[:16, 48:] = (220, 50, 70)  # the cell at the top right
  image[48:, :16] = (124, 83, 62)
  letters = pretrain_vlm.sketch(image)
  named = pretrain_vlm.PALETTE[[pretrain_vlm.LETTERS.index(letter) for letter in letters]]
  assert len(letters) == 17 and (np.delete(named, [0, 4, 13], 0) == 255).all()
  np.testing.assert_array_equal(named[4], (221, 46, 68))
  np.testing.assert_array_equal(named[13], (124, 83, 62))
  assert 200 < named[0].mean() < 255
  assert len(set("".join(pretrain_vlm.LETTERS))) == len(pretrain_vlm.PALETTE) == 69


def test_dialogues_of_words():
  sample = pretrain_vlm.Dialogues(RenderedWords(), describe=True)[0]
  assert sample.answer.startswith("the word ") and sample.texts == pretrain_vlm.DESCRIBE


def test_augmentation_keeps_size_and_can_be_repeated(emoji):
  image = emoji.image(100)
  one, two = (pretrain_vae.augment(image, np.random.default_rng(5)) for _ in range(2))
  np.testing.assert_array_equal(one, two)
  assert one.shape == image.shape and one.dtype == np.uint8
  assert any(not np.array_equal(pretrain_vae.augment(image, np.random.default_rng(i)), image) for i in range(5))
