"""Checkpoint files read as data: tensors and plain values, without torch.load.

Pickle is a program that calls what it names. Here it can name nothing but what fairseq's checkpoints hold, and each of
these names stands for something that takes data only: numpy's own constructors turn bytes of a file into pointers, and
omegaconf's containers resolve ``${oc.env:HOME}``. Tensors are made here from bytes that the file has, since torch finds
an archive's table of contents in another place than Python does, and reads past the end of what it finds.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import math
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from typing import IO, Any, Callable, ClassVar, Iterable

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters
from omegaconf import AnyNode, DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata

NUMBERS = frozenset("?bBhHiIlLqQefd") | {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}


class PlainType:
    """numpy's dtype in a file: a number's."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in NUMBERS:
            raise pickle.UnpicklingError(f"Unsupported class numpy.dtype({str(code)[:20]!r})")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if not (isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", "|", "=") and not any(state[2:5])):
            raise pickle.UnpicklingError("Unsupported class numpy.dtype of other than numbers")

    def values(self, content: bytes) -> np.ndarray:
        if type(content) is not bytes:
            raise pickle.UnpicklingError("an array's values are not bytes")
        return np.frombuffer(content, self.dtype)


class PlainArray(np.ndarray):
    """numpy's array in a file: numbers from bytes. It is saved as any other array."""

    def __new__(cls) -> PlainArray:
        return super().__new__(cls, (0,), "b")

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        if not isinstance(kind, PlainType) or not all(type(size) is int and size >= 0 for size in shape):
            raise pickle.UnpicklingError("an array is not one of numbers")
        array = kind.values(content).reshape(shape, order="F" if is_fortran else "C")
        checked: Any = array.copy("K").__reduce__()[2]  # from here on it is numpy's own
        super().__setstate__(checked)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _array(kind: Any, shape: Any, code: Any) -> PlainArray:
    return PlainArray()


def _scalar(kind: PlainType, content: bytes) -> Any:
    return kind.values(content)[0]


def _safe_globals() -> dict[str, Any]:
    """What fairseq's checkpoints hold besides tensors and plain data, by the name it is pickled under.

    The command line as a Namespace, some tasks' dictionary and, with --eval-bleu, numpy arrays of n-gram counts;
    before fairseq 0.9 its meters.
    """
    named: dict[str, Any] = {
        f"{kind.__module__}.{kind.__qualname__}": kind for kind in (argparse.Namespace, Dictionary)
    }
    named.update({"numpy.ndarray": PlainArray, "numpy.dtype": PlainType})
    for module in ("numpy.core", "numpy._core"):  # numpy 2 moved them: a checkpoint may come from either side
        named.update({f"{module}.multiarray._reconstruct": _array, f"{module}.multiarray.scalar": _scalar})
    for meter in (meters.AverageMeter, meters.StopwatchMeter, meters.TimeMeter):
        named[f"fairseq.meters.{meter.__name__}"] = meter
    return named


def _sent_globals() -> dict[str, Any]:
    """What the first worker also sends to the others, which torch loads too: its configuration."""
    kinds: list[Any] = [DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata, defaultdict, dict, list, int]
    kinds += [distributed_utils._TensorPlaceholder]
    return {**{f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}, "typing.Any": Any}


SAFE_GLOBALS = _safe_globals()
SENT_GLOBALS = _sent_globals()


class ConfigNode:
    """A container or value of omegaconf's in a file, as what it holds; :func:`plain` takes it apart."""

    content: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.content = state["_content"] if "_content" in state else state.get("_val")
        if isinstance(self.content, ConfigNode):  # itself, perhaps
            raise pickle.UnpicklingError("a container of settings is in the place of another's contents")


def plain(value: Any) -> Any:
    """Without omegaconf's containers, one level down."""
    return value.content if isinstance(value, ConfigNode) else value


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str:
        raise pickle.UnpicklingError("it encodes what is no text")
    return text.encode(encoding)


def _no_bytes() -> bytes:
    """How it writes none, as those of an empty array."""
    return b""


def _key(key: Any) -> Any:
    """A name in a dictionary: of a kind whose hash is quick."""
    for each in key if type(key) is tuple else (key,):
        if each is not None and type(each) not in (str, int, bool, float, bytes):
            raise pickle.UnpicklingError("a dictionary has a name that is no text or number")
        if type(each) is int and each.bit_length() > 64:  # many of them have one hash
            raise pickle.UnpicklingError("a dictionary has a name of too many digits")
    return key


def _keys(keys: Iterable[Any]) -> None:
    for key in keys:
        _key(key)


def _holder(value: Any, *kinds: type) -> None:
    """What something is put into, by Python's own ways and not by those of an object in the file."""
    if type(value) not in kinds:
        raise pickle.UnpicklingError(f"it puts something into what is no {kinds[0].__name__}")


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if type(pairs) not in (tuple, list) or not all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs):
        raise pickle.UnpicklingError("it makes a dictionary of what holds no pairs")
    return OrderedDict((_key(key), value) for key, value in pairs)


class _Numbers:
    """One of torch's types of storage, by what its elements are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.size = torch.empty(0, dtype=dtype).element_size()  # bytes of one


class _Storage:
    """A storage in the file."""

    def __init__(self, kind: _Numbers, count: int) -> None:
        self.tensor = torch.empty(count, dtype=kind.dtype)

    def fill(self, file: IO[bytes]) -> None:
        rest = memoryview(self.tensor.view(torch.uint8).numpy()) if len(self.tensor) else memoryview(b"")
        while rest:
            count = file.readinto(rest[: 2**24])  # type: ignore[attr-defined]
            if not count:
                raise pickle.UnpicklingError("the file ends before its tensors do")
            rest = rest[count:]


def _tensor(storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool = False, *_: Any) -> torch.Tensor:
    """torch's ``_rebuild_tensor_v2`` within the bytes that the file has for it."""
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise pickle.UnpicklingError("a tensor is not made of a storage, a shape and strides")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor's shape is not made of numbers")
    available = len(storage.tensor)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else -1
    if last >= available or math.prod(size) > available or max(size, default=0) > max(available, EMPTY):
        raise pickle.UnpicklingError(f"a tensor of shape {size} has only {available} numbers in the file")
    tensor = storage.tensor.as_strided(size, stride, offset).data  # of its own, not a view
    return tensor.requires_grad_(requires_grad is True and tensor.is_floating_point())


def _nothing(*_: Any) -> None:
    """What stands for a type that containers mention."""


_CALLED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{name: SAFE_GLOBALS[name] for name in SAFE_GLOBALS if name.startswith("numpy.") and name != "numpy.ndarray"},
}
_MADE: dict[str, Any] = {
    **{name: kind for name, kind in SAFE_GLOBALS.items() if not name.startswith("numpy.")},
    **{name: ConfigNode for name in SENT_GLOBALS if name.startswith("omegaconf.")},
}
_KINDS = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
}
_MENTIONED = {
    "numpy.ndarray": PlainArray,
    **{f"torch.{kind}Storage": _Numbers(dtype) for kind, dtype in _KINDS.items()},
    **{str(dtype): dtype for dtype in _KINDS.values()},
    **dict.fromkeys(SENT_GLOBALS.keys() - _MADE.keys() - _CALLED.keys(), _nothing),
}
_FOUND = {**_MENTIONED, **_MADE, **_CALLED}
_CALLABLE, _NEW = (tuple(dict.fromkeys(table.values())) for table in (_CALLED, _MADE))
_REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX, pickle.PERSID),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.INT, pickle.LONG),  # in digits, which torch never wrote
)
_VALUES = (type(None), bool, int, float, str, bytes, np.generic, torch.dtype)
_LISTS, _OBJECTS = (list, tuple, set, frozenset), tuple(dict.fromkeys(_MADE.values()))
BITS, DEEPEST, SHARED = 128, 50, 64  # of an integer; levels; names for the same numbers: embeddings of many languages
EMPTY = 2**20  # a length beside one of 0


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value is each for each in allowed)  # what the file made may have an opinion of what it equals


_PythonUnpickler: Any = pickle._Unpickler


class Unpickler(_PythonUnpickler):
    """Of data alone; see the head of this file.

    It is Python's own unpickler in Python: the one in C takes as much memory as an index in the file says.

    Args:
        storage: the file's storage of a kind and a key, with so many elements.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes], storage: Callable[[_Numbers, str, int], _Storage] | None = None) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))  # as protocol 2 writes them
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        if f"{module}.{name}" in _FOUND:
            return _FOUND[f"{module}.{name}"]
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("it names what is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        if self.storage is None or type(kind) is not _Numbers or type(key) is not str or pid[5:] not in ((), (None,)):
            raise pickle.UnpicklingError("it names what is no storage")
        if type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a tensor's length is no number")
        return self.storage(kind, key, count)

    def load_reduce(self) -> None:
        if not _is_among(self.stack[-2], _CALLABLE) or type(self.stack[-1]) is not tuple:
            raise pickle.UnpicklingError("it calls what only holds data")
        super().load_reduce()

    def load_newobj(self) -> None:
        if not _is_among(self.stack[-2], _NEW) or self.stack[-1] != ():
            raise pickle.UnpicklingError("it makes an object of what makes none")
        super().load_newobj()

    def load_build(self) -> None:
        kind, state = type(self.stack[-2]), self.stack[-1]
        holds_values = kind is OrderedDict or _is_among(kind, _NEW)
        if not ((holds_values and type(state) is dict) or kind in (PlainArray, PlainType)):
            raise pickle.UnpicklingError("it sets the state of what has none")
        if kind is OrderedDict and any(hasattr(kind, name) for name in state):
            raise pickle.UnpicklingError("it replaces what a dictionary does")
        super().load_build()

    def load_setitem(self) -> None:
        _holder(self.stack[-3], dict, OrderedDict)
        _key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        _holder(self.metastack[-1][-1], dict, OrderedDict)
        _keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        _keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        _keys(self.stack)
        super().load_frozenset()

    def load_appends(self) -> None:
        _holder(self.metastack[-1][-1], list)
        super().load_appends()

    def load_append(self) -> None:
        _holder(self.stack[-2], list)
        super().load_append()

    def load_long1(self) -> None:
        super().load_long1()
        self._check_long()

    def load_long4(self) -> None:
        super().load_long4()
        self._check_long()

    def _check_long(self) -> None:
        if self.stack[-1].bit_length() > BITS:
            raise pickle.UnpicklingError("it holds a number of too many digits")

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it holds more than data")

    dispatch.update(dict.fromkeys((opcode[0] for opcode in _REFUSED), refuse))
    for _opcode, _method in (
        *((pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_newobj), (pickle.BUILD, load_build)),
        *((pickle.SETITEM, load_setitem), (pickle.SETITEMS, load_setitems), (pickle.DICT, load_dict)),
        *((pickle.ADDITEMS, load_additems), (pickle.FROZENSET, load_frozenset)),
        *((pickle.APPEND, load_append), (pickle.APPENDS, load_appends)),
        *((pickle.LONG1, load_long1), (pickle.LONG4, load_long4)),
    ):
        dispatch[_opcode[0]] = _method


def read(file: IO[bytes]) -> Any:
    """What is in a file of torch.save, on the CPU.

    Raises:
        Exception: any of a dozen kinds.
    """
    whole = os.fstat(file.fileno()).st_size
    start = file.read(2)
    file.seek(0)
    if start == b"PK":
        state = _read_archive(file, whole)
    else:
        _refuse_tar(file)
        state = _read_in_a_row(file, whole)
    _check_data(state, SHARED * whole)
    return state


def _refuse_tar(file: IO[bytes]) -> None:
    """As torch wrote before 0.2; by its magic alone, since tarfile unpacks whatever it is given."""
    file.seek(257)
    if file.read(5) == b"ustar":
        raise pickle.UnpicklingError("a tar archive")
    file.seek(0)


def _read_archive(file: IO[bytes], whole: int) -> Any:
    """A zip archive as torch.save writes it.

    Raises:
        UnpicklingError: it would unpack to more than the file, or run as TorchScript.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        parts = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "constants.pkl" in parts:
            raise pickle.UnpicklingError("a TorchScript archive")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or len(parts) != len(entries):
            raise pickle.UnpicklingError("its parts are compressed, which torch.save does not do")
        if sum(entry.file_size for entry in entries) > whole:
            raise pickle.UnpicklingError("its parts are larger than the file")
        if "data.pkl" not in parts:
            raise pickle.UnpicklingError("an archive without data.pkl")
        if "byteorder" in parts and archive.read(parts["byteorder"]) != b"little":
            raise pickle.UnpicklingError("written on a big-endian machine")
        found: dict[str, _Storage] = {}

        def storage(kind: _Numbers, key: str, count: int) -> _Storage:
            entry = parts.get(f"data/{key}")
            if entry is None or count * kind.size > entry.file_size:
                raise pickle.UnpicklingError(f"a tensor of {count} numbers is larger than its part of the file")
            if key not in found:
                found[key] = _Storage(kind, count)
                with archive.open(entry) as content:
                    found[key].fill(content)
            return _same(found[key], kind, count)

        with archive.open(parts["data.pkl"]) as program:
            return Unpickler(program, storage).load()


def _read_in_a_row(file: IO[bytes], whole: int) -> Any:
    """The form before torch 1.6: what made it, the state, and then its storages, one after the other."""
    if [Unpickler(file).load() for _ in range(2)] != [0x1950A86A20F9469CFC6C, 1001]:
        raise pickle.UnpicklingError("not written by torch.save")
    machine = Unpickler(file).load()
    if not (isinstance(machine, dict) and machine.get("little_endian") is True):
        raise pickle.UnpicklingError("written on a big-endian machine")
    found: dict[str, _Storage] = {}
    left = whole

    def storage(kind: _Numbers, key: str, count: int) -> _Storage:
        nonlocal left
        if key not in found:
            left -= count * kind.size
            if left < 0:
                raise pickle.UnpicklingError(f"a tensor of {count} numbers is larger than its part of the file")
            found[key] = _Storage(kind, count)
        return _same(found[key], kind, count)

    state, keys = Unpickler(file, storage).load(), Unpickler(file).load()
    if type(keys) is not list or len(keys) != len(found) or not all(type(key) is str and key in found for key in keys):
        raise pickle.UnpicklingError("its storages are not those of its tensors")
    for key in keys:
        if int.from_bytes(file.read(8), "little") != len(found[key].tensor):
            raise pickle.UnpicklingError("its storages are not those of its tensors")
        found.pop(key).fill(file)
    return state


def _same(storage: _Storage, kind: _Numbers, count: int) -> _Storage:
    if (storage.tensor.dtype, len(storage.tensor)) != (kind.dtype, count):
        raise pickle.UnpicklingError("it reads the same bytes as numbers of two kinds")
    return storage


def _check_data(state: Any, most: int) -> None:
    """Raises:
    UnpicklingError: there is something in it that is no data, or it is much more than the file.
    """
    seen: set[int] = set()
    waiting = [(state, 0)]
    while waiting:
        value, level = waiting.pop()
        if isinstance(value, torch.Tensor):  # under each of its names
            most -= value.numel() * value.element_size()
        if most < 0:
            raise pickle.UnpicklingError("its weights are many times as large as the file")
        if isinstance(value, (torch.Tensor, *_VALUES)) or id(value) in seen:
            continue
        seen.add(id(value))
        inner: Iterable[Any]
        if isinstance(value, _LISTS):
            inner = value
        elif isinstance(value, dict):
            inner = [*value.values(), *vars(value).values()] if isinstance(value, OrderedDict) else value.values()
        elif isinstance(value, PlainArray):
            inner = ()
        elif type(value) in _OBJECTS:
            inner = vars(value).values()
        else:
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, which is no data")
        if level > DEEPEST:
            raise pickle.UnpicklingError(f"its values are nested more than {DEEPEST} deep")
        waiting.extend((each, level + 1) for each in inner)
