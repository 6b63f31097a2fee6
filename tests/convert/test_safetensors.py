"""Reading and writing of checkpoint files, and errors for damaged files."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mister_jax.convert.safetensors import Checkpoint, FileTensor, save_tensors
from mister_jax.errors import InputError

FIRST = "model-00001-of-00003.safetensors"


def tensors():
    random = np.random.default_rng(0)
    return {
        "embedding": random.normal(size=(6, 4)).astype(np.float32),
        "half": random.normal(size=(3, 5)).astype(np.float16),
        "brain": random.normal(size=(2, 3)).astype(jnp.bfloat16),
        "numbers": np.arange(5),
        "flags": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def assert_same(checkpoint, expected):
    assert set(checkpoint) == set(expected) and len(checkpoint) == len(expected)
    for name, value in expected.items():
        tensor = checkpoint[name]
        assert tensor.shape == value.shape and tensor.dtype == value.dtype
        np.testing.assert_array_equal(tensor[...], value)


def assert_rejected(path, *words):
    """Checks that opening a file raises a one-line error with the words; returns the error."""
    with pytest.raises(InputError) as error:
        Checkpoint.open(path)
    message = str(error.value)
    assert "\n" not in message
    for word in (*words, str(path)):
        assert word in message
    return message


def save_in_shards(folder):
    """Writes a checkpoint in three files."""
    save_tensors(folder, tensors(), max_shard_size=50)
    assert len(list(folder.glob("model-*.safetensors"))) == 3


def edit_header(path, change):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def test_the_safetensors_library_reads_saved_files(tmp_path):
    save_tensors(tmp_path, tensors())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    for name, value in tensors().items():
        np.testing.assert_array_equal(loaded[name], value)


def test_files_of_the_safetensors_library_are_read(tmp_path):
    save_file(tensors(), tmp_path / "any.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "any.safetensors")
    assert_same(checkpoint, tensors())
    assert checkpoint.metadata == {"format": "pt"}


def test_shards_are_read_by_their_index(tmp_path):
    save_in_shards(tmp_path)
    assert_same(Checkpoint.open(tmp_path), tensors())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors().values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


def test_a_slice_of_a_file_larger_than_memory_is_read(tmp_path):
    path, size = tmp_path / "model.safetensors", 2**36
    entry = {"dtype": "U8", "shape": [2**18, 2**18], "data_offsets": [0, size]}
    text = json.dumps({"large": entry}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + size)  # A sparse file takes no disk space.
        file.seek(-3, 2)
        file.write(bytes([1, 2, 3]))
    tensor = Checkpoint.open(path)["large"]
    np.testing.assert_array_equal(tensor[-2:, -3:], [[0, 0, 0], [1, 2, 3]])


def test_many_tensors_need_few_open_files(tmp_path):
    many = {str(index): np.full(3, index) for index in range(3000)}
    save_tensors(tmp_path, many)
    read = {name: np.array(tensor[...]) for name, tensor in Checkpoint.open(tmp_path).items()}
    np.testing.assert_array_equal(read["2999"], many["2999"])


def test_saving_removes_the_weights_of_an_earlier_save(tmp_path):
    save_in_shards(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_tensors(tmp_path, {"one": np.ones(2)})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    save_in_shards(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(Checkpoint.open(tmp_path), tensors())


def test_a_checkpoint_can_be_saved_over_itself(tmp_path):
    save_in_shards(tmp_path)
    save_tensors(tmp_path, Checkpoint.open(tmp_path))
    assert_same(Checkpoint.open(tmp_path), tensors())


def test_a_failed_save_keeps_the_earlier_weights(tmp_path):
    class Unreadable:
        shape, dtype = (2,), np.dtype(np.float32)

        def __getitem__(self, index):
            raise OSError("gone")

    save_in_shards(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot be written"):
        save_tensors(tmp_path, {"one": np.ones(2), "two": Unreadable()})
    assert sorted(tmp_path.iterdir()) == before
    assert_same(Checkpoint.open(tmp_path), tensors())


def test_unsupported_dtypes_are_rejected(tmp_path):
    with pytest.raises(InputError, match="tensor odd has dtype complex64; allowed: bool"):
        save_tensors(tmp_path, {"odd": np.zeros(2, np.complex64)})


def test_missing_and_unknown_files_are_rejected(tmp_path):
    assert_rejected(tmp_path / "nothing", "no such file or folder")
    assert_rejected(tmp_path, "no weights")
    (tmp_path / "notes.txt").touch()
    assert_rejected(tmp_path / "notes.txt", "unknown file type")


def test_the_error_for_a_pytorch_folder_explains_the_conversion(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    assert_rejected(tmp_path, "pytorch_model.bin", "AutoModel.from_pretrained", "save_pretrained")


def test_missing_shards_are_rejected(tmp_path):
    save_in_shards(tmp_path)
    (tmp_path / FIRST).unlink()
    with pytest.raises(InputError, match=f"1 of 3 shards missing: .*{FIRST}"):
        Checkpoint.open(tmp_path)


def test_an_index_cannot_name_files_outside_its_folder(tmp_path):
    save_tensors(tmp_path / "elsewhere", tensors())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"half": "elsewhere/model.safetensors"}}))
    assert_rejected(index, "1 of 1 shards missing")


def test_tensors_missing_from_their_shards_are_rejected(tmp_path):
    save_in_shards(tmp_path)
    save_file({"other": np.ones(2)}, tmp_path / FIRST)
    assert_rejected(
        tmp_path / "model.safetensors.index.json", "missing from their shards", "embedding"
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_rejected(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert_rejected(index, "damaged")


@pytest.mark.parametrize("length", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_rejected(tmp_path, length):
    save_tensors(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    message = assert_rejected(path)
    assert "truncated" in message or "not a safetensors file" in message


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        (4).to_bytes(8, "little") + b"{[[}",
        (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}" + b"surplus",
    ],
)
def test_a_damaged_header_is_rejected(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    message = assert_rejected(path)
    assert "damaged" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shape", [6, 5], "damaged at tensor embedding"),
        ("shape", [-6, -4], "damaged at tensor embedding"),
        ("shape", "64", "damaged at tensor embedding"),
        ("shape", None, "damaged at tensor embedding"),
        ("data_offsets", [0], "damaged at tensor embedding"),
        ("dtype", "F8_E4M3", "tensor embedding has dtype F8_E4M3; allowed: BOOL"),
        ("dtype", [], "damaged at tensor embedding"),
    ],
)
def test_a_damaged_header_entry_is_rejected(tmp_path, key, value, message):
    save_tensors(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    edit_header(path, lambda header: header["embedding"].update({key: value}))
    assert_rejected(path, message)


def test_tensors_have_the_path_of_their_file(tmp_path):
    save_in_shards(tmp_path)
    tensor = Checkpoint.open(tmp_path)["embedding"]
    assert isinstance(tensor, FileTensor) and tensor.file == tmp_path / FIRST


def test_pytorch_files_need_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pth").touch()
    assert_rejected(tmp_path / "model.pth", "needs PyTorch", "install it, or convert")


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_are_read(tmp_path, zipped):
    import torch

    path = tmp_path / "model.pth"
    bfloat16 = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T
    content = {"model": {"a": bfloat16, "b": {"c": torch.ones(2)}}, "cfg": {"width": 3}, "epoch": 4}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint.open(path)
    assert set(checkpoint) == {"model.a", "model.b.c"}
    assert checkpoint["model.a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(checkpoint["model.a"][1:], [[1, 4], [2, 5]])
    assert checkpoint.metadata["cfg"] == {"width": 3} and checkpoint.metadata["epoch"] == 4
    save_tensors(tmp_path / "converted", checkpoint)
    assert_same(Checkpoint.open(tmp_path / "converted"), {k: v[...] for k, v in checkpoint.items()})


@pytest.mark.parity
def test_damaged_pytorch_files_are_rejected(tmp_path):
    import torch

    path = tmp_path / "model.pt"
    path.write_bytes(b"nonsense")
    assert_rejected(path, "not a readable PyTorch file")
    torch.save([torch.ones(2)], path)
    assert_rejected(path, "not a state_dict")
