"""Ten kinds of broken files: each is named, the others are all read, and nothing outside the folder is. A run that trains
on 100,000 entries: python -m tests.data.broken_files
"""

from collections import Counter

import pytest

from tests.data import broken_files

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def test_every_broken_entry_is_named_and_the_stream_goes_on(tmp_path):
  kinds = broken_files.build(tmp_path, 2000)
  counts = broken_files.check(kinds, 2000, *broken_files.read(tmp_path, 2000))
  assert counts == dict.fromkeys(broken_files.KINDS, 2)


def test_the_check_sees_what_is_missing(tmp_path):
  kinds = broken_files.build(tmp_path, 1000)
  seen, bad = broken_files.read(tmp_path, 1000)
  index, wrong = next(iter(kinds)), pytest.raises(AssertionError)
  with wrong:
    broken_files.check({i: kind for i, kind in kinds.items() if i != index}, 1000, seen, bad)
  with wrong:
    broken_files.check(kinds | {index: "missing file"}, 1000, seen, bad)
  seen.entries.update([index])
  with wrong:
    broken_files.check(kinds, 1000, seen, bad)
  seen.entries.subtract([index])
  seen.entries += Counter()
  broken_files.check(kinds, 1000, seen, bad)
  seen.greys.add(broken_files.SECRET)
  with wrong:
    broken_files.check(kinds, 1000, seen, bad)
