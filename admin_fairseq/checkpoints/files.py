"""Reading and writing fairseq's checkpoint files."""

from __future__ import annotations

import _compat_pickle
import argparse
import contextlib
import os
import pickle
import re
from collections import OrderedDict, defaultdict
from typing import Any, Dict, Iterator

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters
from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata

from admin_fairseq.config import as_namespace
from admin_fairseq.errors import AdminError
from admin_fairseq.files import writing

Weights = Dict[str, torch.Tensor]
State = Dict[str, Any]  # of a checkpoint


def _safe_globals() -> dict[str, Any]:
    """What fairseq's checkpoints hold besides tensors and plain data, by the name it is pickled under.

    The command line as a Namespace, some tasks' dictionary and, with --eval-bleu, numpy arrays of n-gram counts;
    before fairseq 0.9 its meters. The first worker sends it to the others with its configuration, as omegaconf's
    containers.
    """
    kinds: list[Any] = [argparse.Namespace, Dictionary, np.ndarray, np.dtype, distributed_utils._TensorPlaceholder]
    kinds += [type(np.dtype(kind)) for kind in (np.float64, np.int64)]
    kinds += [DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata, defaultdict, dict, list, int]
    named: dict[str, Any] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}
    named["typing.Any"] = Any
    functions: list[Any] = [value.__reduce__()[0] for value in (np.zeros(0), np.float64(0))]
    for function in functions:
        for module in ("numpy.core", "numpy._core"):  # numpy 2 moved them: a checkpoint may come from either side
            named[f"{module}.multiarray.{function.__name__}"] = function
    for meter in (meters.AverageMeter, meters.StopwatchMeter, meters.TimeMeter):
        named[f"fairseq.meters.{meter.__name__}"] = meter
    return named


SAFE_GLOBALS = _safe_globals()


class _SafePickle:
    """What torch.load needs of the module ``pickle``; it finds nothing but SAFE_GLOBALS and what makes up tensors.

    For torch before 2.6, whose ``weights_only`` cannot be told of further classes.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)  # protocol 2 writes Python 2's names
            if f"{module}.{name}" in _SAFE_BELOW_2_6:
                return _SAFE_BELOW_2_6[f"{module}.{name}"]
            is_storage = module == "torch" and re.fullmatch(r"\w+Storage", name)
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            is_tensor = module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter")
            if is_storage or is_dtype or is_tensor:
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")

    @classmethod
    def load(cls, file: Any, **options: Any) -> Any:
        return cls.Unpickler(file, **options).load()


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes the bytes of numpy's numbers."""
    return text.encode(encoding)


_SAFE_BELOW_2_6 = {**SAFE_GLOBALS, "_codecs.encode": _encode, "collections.OrderedDict": OrderedDict}


@contextlib.contextmanager
def _safe_pickle() -> Iterator[None]:
    """_SafePickle in the place of what torch.load unpickles with; torch 1.13 ignores its argument pickle_module."""
    module, torch.serialization.pickle = torch.serialization.pickle, _SafePickle
    try:
        yield
    finally:
        torch.serialization.pickle = module


def load(path: str) -> State:
    """The checkpoint as fairseq's dictionary, on the CPU; no code that the file names is run.

    Raises:
        AdminError: the file is missing or not a fairseq checkpoint, or holds objects of other classes.
    """
    if not os.path.isfile(path):
        raise AdminError(f"{path} is a folder, not a checkpoint" if os.path.isdir(path) else f"no such file: {path}")
    try:
        if torch.__version__ >= "2.6":
            state = torch.load(path, map_location="cpu", weights_only=True)  # hooks.install lists SAFE_GLOBALS
        else:
            with _safe_pickle():
                state = torch.load(path, map_location="cpu", weights_only=False)
        if not isinstance(state["model"], dict):
            raise TypeError("its weights are not a dictionary")
        if not all(isinstance(name, str) for name in state["model"]):
            raise TypeError("a weight's name is not text")
    except Exception as error:  # bytes that are no checkpoint end in any of a dozen errors
        refused = re.search(r"(?i)unsupported (?:global: GLOBAL|global|class) (\S+)", str(error))
        if refused:
            raise AdminError(
                f"{path} holds an object of {refused[1]}, which safe loading does not read; nothing in the file was run"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in reason:  # torch's advice is to read it by running what it names
            reason = "it is not made of tensors and plain data"
        raise AdminError(f"{path} is not a fairseq checkpoint ({reason[:200]})") from error
    return state


def settings(state: State) -> argparse.Namespace:
    """A checkpoint's settings as one flat namespace, from any of the forms in which fairseq has kept them.

    Raises:
        AdminError: there are none, or their names are not text.
    """
    args, cfg = state.get("args"), state.get("cfg")
    if isinstance(args, (dict, argparse.Namespace)):
        return _namespace(args if isinstance(args, dict) else vars(args))
    if not isinstance(cfg, (dict, DictConfig)):
        raise AdminError("it holds no settings")
    options: dict[str, Any] = {}
    names = {}
    for section, values in cfg.items():
        if isinstance(values, (dict, DictConfig)):
            values = as_namespace(OmegaConf.create(values)) if section == "model" else _namespace(values)
        if isinstance(values, argparse.Namespace):
            options.update(vars(values))
            if "_name" in options:
                names["arch" if section == "model" else section] = options.pop("_name")
    return argparse.Namespace(**{**options, **names})


def _namespace(options: Any) -> argparse.Namespace:
    if not all(isinstance(name, str) for name in options):
        raise AdminError("its settings have names that are not text")
    return argparse.Namespace(**options)


def save(state: State, path: str) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Raises:
        AdminError: it cannot be written.
    """
    with writing(path) as out:
        torch.save(state, out)
