import pickle

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from deepgen_jax.data.formats.records import ArrayRecords, Tfds
from deepgen_jax.errors import UserError
from tests.data.formats.pictures import numbers, picture


def example(**features):
  """A serialized tf.train.Example of lists of bytes."""
  record = tf_example_pb2.Example()
  for name, values in features.items():
    record.features.feature[name].bytes_list.value.extend(values)
  return record.SerializeToString()


def write(file, records):
  writer = ArrayRecordWriter(str(file), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return file


def test_array_record(tmp_path):
  for shard in range(2):
    records = [example(image=[picture(n)], caption=[f"text {n}".encode()]) for n in (2 * shard, 2 * shard + 1)]
    write(tmp_path / f"set.array_record-0000{shard}-of-00002", records)
  source = ArrayRecords(tmp_path)
  assert source.task == "generate" and [numbers(source[i]) for i in range(len(source))] == [[0], [1], [2], [3]]
  assert source[3].texts == ("text 3",) and pickle.loads(pickle.dumps(source))[3].texts == ("text 3",)


def test_edits_and_broken_records(tmp_path):
  good = example(source=[picture(1), picture(2)], target=[picture(3)], instruction=[b"one", b"two"])
  broken = [b"no proto", example(source=[b"no image"], target=[picture(3)], instruction=[b"x"]), example(target=[b"\x89PNG"])]
  file = write(tmp_path / "edits.array_record", [broken[0], good, *broken[1:]])
  source = ArrayRecords(file)
  assert source.task == "edit" and numbers(source[1]) == [3, 1, 2] and source[1].texts == ("one", "two")
  for index, message in [(0, "record 0 of"), (3, "record 3 of .*no text")]:
    with pytest.raises(UserError, match=message):
      source[index]
  assert source[2].references == ()  # which Guarded replaces
  with pytest.raises(UserError, match=r"record 2 of .*'source' is missing"):
    ArrayRecords(file, references="source")[2]


def test_a_damaged_file(tmp_path):
  (tmp_path / "a.array_record").write_bytes(b"x" * 100)
  with pytest.raises(UserError, match=r"a\.array_record can't be read"):
    ArrayRecords(tmp_path / "a.array_record")


class Pairs(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.2.0")
  url_infos = {}  # noqa: RUF012  TFDS's own attribute

  def _info(self):
    image = tfds.features.Image(encoding_format="png")
    features = {"input": tfds.features.Sequence(image), "output": image, "prompt": tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(range(6)), "test": self._generate_examples(range(90, 92))}

  def _generate_examples(self, ns):
    for n in ns:
      yield n, {"input": [picture(n + 1), picture(n + 2)], "output": picture(n), "prompt": f"text {n}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  Pairs(data_dir=str(root), file_format="array_record").download_and_prepare()
  return root


def test_tfds_by_name_and_by_folder(prepared):
  source = Tfds("pairs", folder=prepared)
  assert source.task == "edit" and len(source) == 6
  assert sorted(numbers(source[i]) for i in range(6)) == [[n, n + 1, n + 2] for n in range(6)]
  assert source[0].texts == (f"text {numbers(source[0])[0]}",)
  again = pickle.loads(pickle.dumps(source))
  assert numbers(again[5]) == numbers(source[5])
  assert len(Tfds("pairs:1.2.0", folder=prepared, split="train[:50%]")) == 3
  assert len(Tfds(prepared / "pairs" / "1.2.0", split="test", task="generate")) == 2


def test_tfds_that_is_not_there(prepared, tmp_path):
  with pytest.raises(UserError, match=r"no split 'tain', but train, test\. Did you mean 'train'"):
    Tfds("pairs", folder=prepared, split="tain")
  with pytest.raises(UserError, match="tfds build unknown --file_format=array_record"):
    Tfds("unknown", folder=prepared)
  with pytest.raises(UserError, match=r"no such file or folder: .*nowhere"):
    Tfds(tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"holds no dataset_info\.json"):
    Tfds(tmp_path)
  Pairs(data_dir=str(tmp_path), file_format="parquet").download_and_prepare()
  with pytest.raises(UserError, match="prepared as parquet, which can't"):
    Tfds("pairs", folder=tmp_path)
