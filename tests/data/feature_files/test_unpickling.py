"""Pickles of plain data are read, and nothing in them runs."""

import collections
import copyreg
import functools
import io
import os
import pathlib
import pickle
import struct

import numpy as np
import pytest

from mister_jax.data.feature_files.unpickling import load_pickle
from mister_jax.errors import InputError

VALUES = {
    "float64": np.arange(12.0).reshape(3, 4),
    "float16": np.arange(3, dtype=np.float16),
    "big_endian": np.arange(3, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "empty": np.zeros((0, 3)),
    "scalar_array": np.array(3.0),
    "bool": np.array([True, False]),
    "text": np.array(["x", "yé"]),
    "bytes": np.array([b"ab", b"c"]),
}
PLAIN = {
    "scalars": [np.float32(1.5), np.int64(3), np.str_("é"), np.bool_(True)],
    "numbers": [1, 2.5, None, True, 10**30],
    "set": {1, 2},
    "frozenset": frozenset("ab"),
    "tuple": (1, ("a", b"\x00\xff")),
    "ordered": collections.OrderedDict(a=[1]),
    "default": collections.defaultdict(list, {"k": [1]}),
    "bytearray": bytearray(b"12"),
}


def write(folder: pathlib.Path, content: bytes) -> pathlib.Path:
    path = folder / "features.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_are_read(tmp_path, protocol):
    shared = [1.5]
    objects = np.array([np.arange(2.0), None, "s", [np.ones(1)]], object)
    value = {**VALUES, **PLAIN, "shared": [shared, shared], "objects": objects, "range": range(4)}
    loaded = load_pickle(write(tmp_path, pickle.dumps(value, protocol)))
    assert list(loaded) == list(value)
    for name, array in VALUES.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype, name
    for name, plain in PLAIN.items():
        assert loaded[name] == plain, name
    assert loaded["range"] == [0, 1, 2, 3]
    assert loaded["shared"][0] is loaded["shared"][1]
    np.testing.assert_array_equal(loaded["objects"][0], np.arange(2.0))
    assert loaded["objects"][1:3].tolist() == [None, "s"]
    np.testing.assert_array_equal(loaded["objects"][3][0], np.ones(1))


def test_a_pickle_of_python_2_is_read(tmp_path):
    # Python 2 wrote byte strings, including the bytes of arrays, with the opcode U.
    raw = struct.pack("<2d", 1.5, -2.0)
    content = b"\x80\x02}(U\x04Ses1U\x05caf\xe9sU\x01ac"
    content += b"numpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    content += b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R"
    content += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    content += b"U" + bytes([len(raw)]) + raw + b"tbU\x01sc__builtin__\nset\n](K\x01K\x02e\x85Ru."
    loaded = load_pickle(write(tmp_path, content))
    assert loaded["Ses1"] == "cafés" and loaded["s"] == {1, 2}
    np.testing.assert_array_equal(loaded["a"], [1.5, -2.0])


class Call:
    """Object that pickles as a function call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def by_extension(function, *arguments):
    """Pickles a function call that refers to the function by an extension code of `copyreg`."""
    copyreg.add_extension(function.__module__, function.__name__, 240)
    try:
        return pickle.dumps(Call(function, *arguments), 2)
    finally:
        copyreg.remove_extension(function.__module__, function.__name__, 240)


def attacks(mark: pathlib.Path) -> dict[str, bytes]:
    """Maps the function that a malicious pickle names to the pickle; most try to create `mark`."""
    command, code = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    text = command.encode()
    stack_global = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c"
    return {
        "posix.system": pickle.dumps(Call(os.system, command)),
        "posix.system;": pickle.dumps({"labels": {"d1": [1, (2, Call(os.system, command))]}}),
        "builtins.eval": pickle.dumps(Call(eval, code)),
        "__builtin__.exec": pickle.dumps(Call(exec, code), 0),
        "builtins.getattr": b"cbuiltins\ngetattr\n(cos\npath\nVjoin\ntR.",
        "os.system": stack_global + bytes([len(text)]) + text + b"\x85R.",
        "nt.system": b"(V" + text + b"\nint\nsystem\n.",
        "copyreg._reconstructor": pickle.dumps(Call(copyreg._reconstructor, object, object, None)),
        "numpy.load": b"cnumpy\nload\n(V/etc/passwd\ntR.",
        "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "functools.partial": pickle.dumps(functools.partial(os.system, command)),
        "subprocess.Popen": b"csubprocess\nPopen\n(V" + text + b"\ntR.",
    }


@pytest.mark.parametrize("name", attacks(pathlib.Path("mark")))
def test_a_pickle_that_wants_to_run_something_is_refused_and_not_run(tmp_path, name):
    mark = tmp_path / "mark"
    path = write(tmp_path, attacks(mark)[name])
    with pytest.raises(
        InputError, match=f"wants to run {name.rstrip(';')}; allowed: NumPy"
    ) as error:
        load_pickle(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert not mark.exists()


def test_an_extension_code_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    path = write(tmp_path, by_extension(os.system, f"touch {mark}"))
    with pytest.raises(InputError):
        load_pickle(path)
    assert not mark.exists()


def global_pickle(module, name):
    return f"c{module}\n{name}\n.".encode()


ZIP = io.BytesIO()
np.savez(ZIP, a=np.zeros(1))
INVALID = {
    "holds PyTorch tensors; save NumPy arrays instead": global_pickle(
        "torch._utils", "_rebuild_tensor_v2"
    ),
    "holds pandas objects; save NumPy arrays instead": global_pickle(
        "pandas.core.frame", "DataFrame"
    ),
    "holds arrays of type 'V8'": b"cnumpy\ndtype\n(VV8\nI0\nI1\ntR.",
    "refers to data outside of the pickle": b"P1\n.",
    "damaged or truncated pickle": pickle.dumps(VALUES)[:-20],
    "not a pickle": b"a text",
    "not a pickle but a zip archive": ZIP.getvalue(),
    "not a pickle but an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "not a pickle but a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "has containers nested more than 20 deep": b"]" * 30 + b"a" * 29 + b".",
}


@pytest.mark.parametrize("message", INVALID)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, message):
    path = write(tmp_path, INVALID[message])
    with pytest.raises(InputError) as error:
        load_pickle(path)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


def array_pickle(state: str, dtype: str = "f8") -> bytes:
    """Returns a pickle of an array with a state that NumPy does not write."""
    head = "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
    return f"{head}(I1\n{state}tb.".replace(
        "DTYPE", f"cnumpy\ndtype\n(V{dtype}\nI0\nI1\ntR"
    ).encode()


@pytest.mark.parametrize(
    "content",
    [
        array_pickle("(I9\ntDTYPEI00\nVabc\n"),
        array_pickle("(I-1\ntDTYPEI00\nV\n"),
        array_pickle("(I1000000000000000\ntDTYPEI00\nV\n"),
        # NumPy would read beyond the end of the list.
        array_pickle("(I1000000\ntDTYPEI00\n(l", "O8"),
        array_pickle("(I1\ntDTYPEI00\nVabcdefgh\n", "O8"),
        array_pickle("(I1\ntDTYPEI00\nV\xff\xff\xff\xff\n", "U1"),
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cbuiltins\nlist\n(cbuiltins\nrange\n(I1000000000000\ntRtR.",
        b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
    ],
)
def test_damaged_arrays_and_huge_values_are_refused(tmp_path, content):
    with pytest.raises(InputError):
        load_pickle(write(tmp_path, content))
