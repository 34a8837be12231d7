"""Checkpoint files read as data: tensors and plain values, with whatever torch.

Pickle is a program that calls what it names. Here it can name nothing but what fairseq's checkpoints hold, and each of
these names stands for something that takes data only: numpy's own constructors turn bytes of a file into pointers,
omegaconf's containers resolve ``${oc.env:HOME}``, torch's tensors may claim more memory than the file has bytes.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import contextlib
import math
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from typing import IO, Any, Callable, ClassVar, Iterator

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


def plain(value: Any) -> Any:
    """Without omegaconf's containers, one level down."""
    while isinstance(value, ConfigNode):
        value = value.content
    return value


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """How protocol 2 writes bytes."""
    return text.encode(encoding)


def _no_bytes() -> bytes:
    """How it writes none, as those of an empty array."""
    return b""


def _tensor(storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool = False, *_: Any) -> torch.Tensor:
    """torch's ``_rebuild_tensor_v2`` within the bytes that the file has for it."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor's shape is not made of numbers")
    available = getattr(storage, "_size", storage.size)()  # torch 2's, which does not warn
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else -1
    if last >= available or math.prod(size) > available:
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} has only {available} numbers in the file")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, bool(requires_grad), OrderedDict())


def _nothing(*_: Any) -> None:
    """What stands for a type that containers mention."""


_CALLED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{name: SAFE_GLOBALS[name] for name in SAFE_GLOBALS if name.startswith("numpy.") and name != "numpy.ndarray"},
}
_MADE: dict[str, Any] = {
    **{name: kind for name, kind in SAFE_GLOBALS.items() if not name.startswith("numpy.")},
    **{name: ConfigNode for name in SENT_GLOBALS if name.startswith("omegaconf.")},
}
_MENTIONED = {
    "numpy.ndarray": PlainArray,
    **dict.fromkeys(SENT_GLOBALS.keys() - _MADE.keys() - _CALLED.keys(), _nothing),
}
_FOUND = {**_MENTIONED, **_MADE, **_CALLED}
_CALLABLE, _NEW = (tuple(dict.fromkeys(table.values())) for table in (_CALLED, _MADE))
_REFUSED = (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX, pickle.BYTEARRAY8)


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value is each for each in allowed)  # what the file made may have an opinion of what it equals


_PythonUnpickler: Any = pickle._Unpickler


class SafePickle:
    """What torch.load needs of the module ``pickle``; see the head of this file.

    It is Python's own unpickler in Python: the one in C takes as much memory as an index in the file says.
    """

    UnpicklingError = pickle.UnpicklingError

    class Unpickler(_PythonUnpickler):
        dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)
        sizes: dict[str, int] | None = None  # of the file's storages
        largest = 0  # of a file that has no table of them

        def find_class(self, module: str, name: str) -> Any:
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))  # as protocol 2 writes them
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
            if f"{module}.{name}" in _FOUND:
                return _FOUND[f"{module}.{name}"]
            is_storage = module == "torch" and re.fullmatch(r"\w+Storage", name)
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if is_storage or is_dtype:
                return getattr(torch, name)
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")

        def load_reduce(self) -> None:
            if not _is_among(self.stack[-2], _CALLABLE):
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
            super().load_build()

        def load_binpersid(self) -> None:
            pid = self.stack[-1]
            kind, _, key, _, count = pid[:5]
            found = self.largest if self.sizes is None else self.sizes.get(key, -1)
            dtype = pid[1]._dtype if hasattr(pid[1], "_dtype") else getattr(pid[1], "dtype", torch.uint8)
            size = torch.empty(0, dtype=dtype).element_size()
            if kind not in ("storage", b"storage") or type(count) is not int or not 0 <= count * size <= found:
                raise pickle.UnpicklingError(f"a tensor of {count} numbers is larger than its part of the file")
            super().load_binpersid()

        def refuse(self) -> None:
            raise pickle.UnpicklingError("it holds more than data")

        dispatch.update(dict.fromkeys((opcode[0] for opcode in _REFUSED), refuse))
        for _opcode, _method in (
            (pickle.REDUCE, load_reduce),
            (pickle.NEWOBJ, load_newobj),
            (pickle.BUILD, load_build),
            (pickle.BINPERSID, load_binpersid),
        ):
            dispatch[_opcode[0]] = _method

    @classmethod
    def load(cls, file: Any, **options: Any) -> Any:
        return cls.Unpickler(file, **options).load()


@contextlib.contextmanager
def _safe_pickle(file: IO[bytes]) -> Iterator[None]:
    """SafePickle in the place of what torch.load unpickles with; torch 1.13 ignores its argument pickle_module."""
    whole = os.fstat(file.fileno()).st_size

    class Unpickler(SafePickle.Unpickler):
        sizes, largest = _storages(file, whole), whole

    kind = type("SafePickle", (SafePickle,), {"Unpickler": Unpickler})
    module, torch.serialization.pickle = torch.serialization.pickle, kind
    try:
        yield
    finally:
        torch.serialization.pickle = module


def _storages(file: IO[bytes], whole: int) -> dict[str, int] | None:
    """Bytes by storage of a zip archive as torch.save writes it; None for the form before torch 1.6.

    Raises:
        UnpicklingError: an archive that would unpack to more than the file, or run as TorchScript.
    """
    start = file.read(2)
    file.seek(0)
    if start != b"PK":
        is_tar = tarfile.is_tarfile(file.name) if isinstance(file.name, str) else False
        if is_tar:
            raise pickle.UnpicklingError("a tar archive")
        return None
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    file.seek(0)
    names = [entry.filename.partition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise pickle.UnpicklingError("a TorchScript archive")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or len(names) != len(set(names)):
        raise pickle.UnpicklingError("its parts are compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > whole:
        raise pickle.UnpicklingError("its parts are larger than the file")
    return {name[len("data/") :]: entry.file_size for name, entry in zip(names, entries) if name.startswith("data/")}


def read(file: IO[bytes], torch_load: Callable[..., Any] = torch.load) -> Any:
    """What is in a file of torch.save, on the CPU.

    Raises:
        Exception: any of a dozen kinds.
    """
    with _safe_pickle(file):
        return torch_load(file, map_location="cpu", weights_only=False)
