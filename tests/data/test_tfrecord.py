"""TFRecord files are read as TensorFlow reads them."""

import pytest
import tensorflow as tf

from mister_jax.data.tfrecord import read_records
from mister_jax.errors import InputError

RECORDS = [b"", b"a", bytes(range(256)) * 50]


def write_records(path, records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


@pytest.fixture
def path(tmp_path):
    return write_records(tmp_path / "records", RECORDS)


def test_records_of_several_files_are_read_in_order(path, tmp_path):
    other = write_records(tmp_path / "other", [b"b"])
    empty = write_records(tmp_path / "empty", [])
    assert list(read_records([other, empty, path], [1, 0, 3])) == [b"b", *RECORDS]


@pytest.mark.parametrize("position", [0, 9, 17, 30, 40, -1])
def test_a_changed_byte_is_found(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: damaged record at byte") as error:
        list(read_records([path], [3]))
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_found(path):
    content = path.read_bytes()
    ends = {0: 0, 16: 1, 33: 2}  # end of a record -> number of records up to this byte
    for length in (*range(60), len(content) - 1):
        path.write_bytes(content[:length])
        message = f"{ends[length]} of 3 records" if length in ends else "damaged record at byte"
        with pytest.raises(InputError, match=message):
            list(read_records([path], [3]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path / 'absent'}: no such file; copy the dataset"):
        list(read_records([tmp_path / "absent"], [1]))
