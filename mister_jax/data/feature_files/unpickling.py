"""Reads pickles of plain containers and NumPy arrays, and refuses everything else.

A pickle is a program: it names functions, and the unpickler calls them. This unpickler allows the
built-in types of plain values. Plain values and arrays need a few other functions, for which this
module has replacements that check their arguments and build arrays from raw bytes. All other names
are refused, and their modules are never imported.
"""

import math
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from mister_jax.errors import InputError

_TYPES = {
    kind.__name__: kind for kind in (bool, dict, float, frozenset, int, list, set, str, tuple)
}

_NUMPY_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY_BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")

_DTYPE = re.compile(r"[<>=|]?(\?|b1|[iu][1248]|f[248]|[SU]\d*|O\d*)")

# Python 2 pickles use the older name `__builtin__`.
_BUILTINS = ("builtins", "__builtin__")

_MAX_RANGE = 10**7
_MAX_DEPTH = 20

_ARRAYS_INSTEAD = "save NumPy arrays instead"
_FIXES = {
    "torch": f"PyTorch tensors; {_ARRAYS_INSTEAD}, for example tensor.cpu().numpy()",
    "pandas": f"pandas objects; {_ARRAYS_INSTEAD}, for example frame.to_numpy()",
    "scipy": f"SciPy objects; {_ARRAYS_INSTEAD}, for example matrix.toarray()",
    "tensorflow": f"TensorFlow objects; {_ARRAYS_INSTEAD}, for example tensor.numpy()",
}

_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save or numpy.savez write it",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"BZh": "a bzip2 file; unpack it first",
    b"\xfd7zX": "an xz file; unpack it first",
    b"\x93NUM": "a NumPy array",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
}


class _RefusedError(Exception):
    """Raised if a pickle contains something that is not allowed."""


def load_pickle(path: pathlib.Path) -> Any:
    """Reads a pickle of plain containers, numbers, text and arrays, without executing its code.

    Pickles of Python 2 can also be read: their byte strings become text, decoded as Latin-1.

    Returns:
        Nested dicts, lists, tuples and sets with numbers, text and arrays.

    Raises:
        InputError: The file is damaged or is not a pickle, or contains other objects. For a refused
            function or class, the one-line message contains its name.
    """
    try:
        with path.open("rb") as file:
            head = file.read(32)
            if not head:
                raise InputError(f"{path}: an empty file")
            for magic, meaning in _OTHER_FORMATS.items():
                if head.startswith(magic):
                    raise InputError(f"{path}: not a pickle but {meaning}")
            file.seek(0)
            value = _Unpickler(file, encoding="latin1").load()
        return _plain(value, {}, 0)
    except _RefusedError as error:
        raise InputError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise InputError(f"{path}: does not fit in memory, or is damaged") from error
    except InputError:
        raise
    except Exception as error:  # The pickle module raises many types of errors for a damaged file.
        if head[:1] == b"\x80" or head[:1] in b"(}])":
            raise InputError(f"{path}: damaged or truncated pickle") from error
        raise InputError(f"{path}: not a pickle; needed: an npz file or a pickle") from error


class _Array:
    """Array under construction: in a pickle, the array's bytes follow the object."""

    __slots__ = ("dtype", "is_fortran", "items", "shape", "value")

    def __init__(self) -> None:
        self.value: np.ndarray | None = None
        self.items: list[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, is_fortran, content = state
        dtype = _as_dtype(dtype)
        if not isinstance(shape, tuple) or not all(
            type(size) is int and size >= 0 for size in shape
        ):
            raise ValueError(f"array shape {shape}")
        if dtype.hasobject:
            if not isinstance(content, list) or len(content) != math.prod(shape):
                raise ValueError("array of objects whose number does not match the shape")
            self.shape, self.is_fortran, self.items = shape, bool(is_fortran), content
        else:
            self.value = _from_bytes(content, dtype, shape, "F" if is_fortran else "C")


class _DType:
    """NumPy dtype under construction: in a pickle, the byte order follows the object."""

    __slots__ = ("value",)

    def __init__(self, dtype: np.dtype) -> None:
        self.value = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, byte_order, *fields = state
        if any(field is not None for field in fields[:3]):
            raise _RefusedError("holds structured arrays; save each field as a NumPy array instead")
        if byte_order in ("<", ">"):
            self.value = self.value.newbyteorder(byte_order)


class _Unpickler(pickle.Unpickler):
    """Unpickler that calls only the types in `_TYPES` and the functions in this module."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns the allowed function or type of this name."""
        if module in _BUILTINS and name in _TYPES:
            return _TYPES[name]
        function = _function(module, name)
        if function is None:
            package = module.partition(".")[0]
            if package in _FIXES:
                raise _RefusedError(f"holds {_FIXES[package]} ({module}.{name})")
            raise _RefusedError(
                f"wants to run {module}.{name}; allowed: NumPy arrays, numbers, text and plain "
                "containers"
            )
        return function

    def persistent_load(self, _: Any) -> NoReturn:
        """Refuses objects that are stored outside of the pickle."""
        raise _RefusedError("refers to data outside of the pickle, as torch.save writes it")


def _function(module: str, name: str) -> Callable[..., Any] | None:
    """Returns the replacement for a function or class in a pickle, or None if it is refused."""
    match module, name:
        case ("collections", "OrderedDict"):
            return lambda *items: dict(*items)
        case ("collections", "defaultdict"):
            return lambda _=None, *items: dict(*items)
        case ("_codecs", "encode"):
            return _encode
        case _ if module in _BUILTINS and name in ("range", "xrange"):
            return _checked_range
        case _ if module in _BUILTINS and name in ("bytes", "bytearray"):
            return _encode
        case _ if module in _NUMPY_MODULES and name == "ndarray":
            return lambda: None  # This type occurs only as an argument of `_reconstruct`.
        case _ if module in _NUMPY_MODULES and name == "dtype":
            return lambda spec, *_: _DType(_parse_dtype(spec))
        case _ if module in _NUMPY_MODULES and name == "_reconstruct":
            return lambda *_: _Array()
        case _ if module in _NUMPY_MODULES and name == "scalar":
            return lambda dtype, content: _from_bytes(content, _as_dtype(dtype), (), "C")[()]
        case _ if module in _NUMPY_BUFFER_MODULES and name == "_frombuffer":
            return lambda content, dtype, shape, order: _from_bytes(
                content, _as_dtype(dtype), shape, order
            )
    return None


def _encode(text: str | bytes = b"", encoding: str = "latin1") -> bytes:
    """Returns the bytes that a pickle stores as text.

    Rejects encodings other than Latin-1, because looking up a codec can import a module.
    """
    if isinstance(text, bytes | bytearray):
        return bytes(text)
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise ValueError(f"encoding {encoding}")
    return text.encode("latin1")


def _checked_range(*limits: int) -> list[int]:
    numbers = range(*limits)
    if len(numbers) > _MAX_RANGE:
        raise ValueError(f"{len(numbers)} numbers")
    return list(numbers)


def _parse_dtype(spec: Any) -> np.dtype:
    spec = spec.decode("latin1") if isinstance(spec, bytes) else spec
    if not isinstance(spec, str) or not _DTYPE.fullmatch(spec):
        raise _RefusedError(
            f"holds arrays of type {spec!r:.40}; allowed: NumPy arrays of numbers or text"
        )
    return np.dtype("O" if spec.lstrip("<>=|").startswith("O") else spec)


def _as_dtype(dtype: Any) -> np.dtype:
    if not isinstance(dtype, _DType):
        raise ValueError("no dtype")
    return dtype.value


def _from_bytes(content: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
    """Makes an array from raw bytes, which pickles of Python 2 store as text."""
    if isinstance(content, str):
        content = content.encode("latin1")
    if dtype.hasobject or len(memoryview(content).cast("B")) != math.prod(shape) * dtype.itemsize:
        raise ValueError("array whose number of bytes does not match the shape")
    if order not in ("C", "F"):
        raise ValueError(f"array order {order}")
    if dtype.itemsize == 0:
        return np.zeros(shape, dtype)
    array = np.frombuffer(content, dtype).reshape(shape, order=order)
    if dtype.kind == "U":
        codes = np.frombuffer(content, np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if codes.size and codes.max() > 0x10FFFF:
            raise ValueError("array of invalid text")
    return array


def _plain(value: Any, converted: dict[int, Any], depth: int) -> Any:
    """Replaces arrays under construction in nested containers with NumPy arrays.

    Args:
        value: Unpickled value.
        converted: Converted containers by the id of the original container, so that shared values
            stay shared.
        depth: Number of containers around the value.
    """
    if isinstance(value, _DType):
        return value.value
    if not isinstance(value, _Array | dict | list | tuple | set | frozenset):
        return value
    if id(value) in converted:
        return converted[id(value)]
    if depth > _MAX_DEPTH:
        raise _RefusedError(f"has containers nested more than {_MAX_DEPTH} deep")
    result: Any
    if isinstance(value, _Array):
        result = value.value
        if value.items is not None:
            result = np.empty(len(value.items), object)
            for index, item in enumerate(value.items):
                result[index] = _plain(item, converted, depth + 1)
            result = result.reshape(value.shape, order="F" if value.is_fortran else "C")
        elif result is None:
            raise ValueError("array without content")
    elif isinstance(value, dict):
        result = {key: _plain(item, converted, depth + 1) for key, item in value.items()}
    elif isinstance(value, set | frozenset) or _ATOMS.issuperset(map(type, value)):
        result = value
    else:
        result = type(value)([_plain(item, converted, depth + 1) for item in value])
    converted[id(value)] = result
    return result


# Lists that contain only these types, often millions of numbers, need no conversion.
_ATOMS = frozenset({bool, bytes, float, int, str, type(None), np.ndarray})
