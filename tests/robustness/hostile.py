"""Files that attack who reads them, each as a function to its bytes: pickles of any program, archives of any kind."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from typing import Any, Callable, Tuple

import torch

STORE, LONG = zipfile.ZIP_STORED, b"\x8a\x05\x00\x00\x00\x00\x10"  # LONG: 2**36, in a byte a digit


def name(module: str, function: str) -> bytes:
    return f"c{module}\n{function}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def call(module: str, function: str, arguments: bytes) -> bytes:
    return name(module, function) + b"(" + arguments + b"tR"


def state(value: bytes, key: str = "odd", weights: bytes = b"}") -> bytes:
    """A checkpoint with one odd value."""
    return b"\x80\x02}" + text("model") + weights + b"s" + text(key) + value + b"s."


def archive(program: bytes, storages: dict[str, bytes] | None = None, kind: int = STORE, **more: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/byteorder", b"little")
        for key, content in {**(storages or {"0": b"\0" * 64})}.items():
            file.writestr(f"archive/data/{key}", content)
        for key, content in more.items():
            file.writestr(f"archive/{key.replace('_', '.')}", content)
    return out.getvalue()


def storage(count: bytes, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + count + b"tQ"


def tensor(count: bytes, size: bytes, stride: bytes, offset: bytes = b"K\0") -> bytes:
    rest = offset + size + stride + b"\x89" + call("collections", "OrderedDict", b"")
    return call("torch._utils", "_rebuild_tensor_v2", storage(count) + rest)


def weights(value: bytes) -> bytes:
    return b"}" + text("encoder.layers.0.self_attn_layer_norm.omega") + value + b"s"


def array(dtype: bytes, shape: bytes, content: bytes) -> bytes:
    start = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray") + b"K\0\x85" + b"C\x01b")
    return start + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"


def dtype(code: str, *state: Any) -> bytes:
    made = call("numpy", "dtype", text(code) + b"\x89\x88")
    return made + pickle.dumps(state or (3, "<", None, None, None, -1, -1, 0), 2)[2:-1] + b"b"


def holding(**attributes: bytes) -> bytes:
    """A Namespace with these attributes."""
    return NAMESPACE + b")\x81}" + b"".join(text(key) + value + b"s" for key, value in attributes.items()) + b"b"


def raw(content: bytes) -> bytes:
    return b"C" + bytes([len(content)]) + content


def bytes_of(count: int) -> bytes:
    return b"K" + bytes([count])


NAMESPACE = name("argparse", "Namespace")
ENDLESS = (
    name("fairseq.data.dictionary", "Dictionary") + b")\x81}" + text("symbols") + b"]s" + text("unk_word") + b"K\1sb"
)
SHAPE, PLAIN, SYSTEM = b"K\x02\x85", dtype("f8"), b"cos\nsystem\n" + text("touch proof") + b"\x85R"
OBJECTS = (3, "|", None, ("a",), {"a": (b"x", 0)}, 8, 8, 63)
GADGETS = {
    "os.system": SYSTEM,
    "builtins.eval": call("builtins", "eval", text("open('proof', 'w')")),
    "__builtin__.exec": call("__builtin__", "exec", text("open('proof', 'w')")),
    "a function's globals": name("admin_fairseq.checkpoints.files", "load.__globals__"),
    "getattr": call("builtins", "getattr", NAMESPACE + text("__init__")),
    "functools.partial": call("functools", "partial", name("builtins", "print")),
    "torch.load": call("torch", "load", text("other.pt")),
    "torch.hub": call("torch.hub", "load", text("someone/something")),
    "torch's own rebuild by type": call("torch._tensor", "_rebuild_from_type_v2", name("builtins", "print") + b"NNN"),
    "a storage from a file": call("torch", "FloatStorage", text("other.pt")),
    "memory by torch's storage": call("torch", "FloatStorage", LONG),
    "memory by torch.Tensor": call("torch", "Tensor", LONG),
    "memory by bytearray": call("builtins", "bytearray", LONG),
    "memory by bytearray's opcode": b"\x96" + struct.pack("<Q", 2**36) + b"x",
    "memory by bytes' opcode": b"\x8e" + struct.pack("<Q", 2**36) + b"x",
    "memory by an index": b"Nr\xff\xff\xff\x7f0" + SYSTEM,
    "memory by an array": array(PLAIN, b"(" + LONG + LONG + b"t", raw(b"x" * 16)),
    "memory by an array's constructor": call("numpy", "ndarray", LONG + b"\x85"),
    "a state for a class": name("argparse", "Namespace")
    + b"N}"
    + text("__getattr__")
    + name("os", "system")
    + b"s\x86b",
    "a state for a listed class": name("argparse", "Namespace") + b"N}" + text("x") + b"K\1s\x86b",
    "a slot's state": name("argparse", "Namespace")
    + b")\x81N}"
    + text("__class__")
    + name("numpy", "dtype")
    + b"s\x86b",
    "an object of what holds none": name("numpy", "dtype") + b")\x81",
    "object dtype, pointers in an array": array(dtype("O8"), SHAPE, raw(b"A" * 16)),
    "object dtype, a pointer as a scalar": call("numpy.core.multiarray", "scalar", dtype("O8") + raw(b"A" * 8)),
    "object dtype, numpy 2's name": call("numpy._core.multiarray", "scalar", dtype("O8") + raw(b"A" * 8)),
    "object dtype in the state": array(dtype("V8", *OBJECTS), SHAPE, raw(b"A" * 16)),
    "object dtype under a number's name": array(dtype("f8", *OBJECTS), SHAPE, raw(b"A" * 16)),
    "object dtype as a constructor's buffer": call("numpy", "ndarray", SHAPE + text("O") + raw(b"A" * 16)),
    "a dtype of another size": array(dtype("f8", 3, "<", None, None, {"a": 1}, 800, -1, 0), SHAPE, raw(b"A" * 16)),
    "too few bytes": array(PLAIN, b"K\x09\x85", raw(b"A" * 16)),
    "negative sizes": array(PLAIN, number(-1) + number(-2) + b"\x86", raw(b"A" * 16)),
    "text for bytes": array(PLAIN, SHAPE, text("A" * 16)),
    "no dtype": array(text("f8"), SHAPE, raw(b"A" * 16)),
    "an extension": b"\x82\x01",
    "an old-style object": b"(ios\nsystem\n",
    "an object by its class": b"(" + NAMESPACE + text("x") + b"o",
    "a persistent name": text("storage") + b"Q",
    "a name of many levels": b"})" + b"\x85" * 200_000 + b"K\1s",
    "a name of 2**60 parts": b"})" + b"2\x86" * 60 + b"K\1s",
    "names of a set": b"\x8f(})t\x90",
    "arguments without end": name("collections", "OrderedDict") + ENDLESS + b"R",
    "an encoder of its own": call("_codecs", "encode", holding(encode=name("torch", "FloatStorage")) + LONG),
    "a list of its own": holding(append=name("torch", "FloatStorage")) + LONG + b"a",
    "a dictionary's own functions": name("collections", "OrderedDict") + b")R}" + text("items") + b"K\1sb",
    "a view of memory": array(PLAIN, SHAPE, raw(b"A" * 16)) + b"\x98",
    "a number of 5,000 digits": number(10**5000),
    "a number in digits": b"I" + b"9" * 5000 + b"\n",
    "a storage": storage(b"K\x10"),
    "a type of storage": name("torch", "FloatStorage"),
    "a configuration in itself": name("omegaconf.dictconfig", "DictConfig")
    + b")\x81q\x05}"
    + text("_content")
    + b"h\x05sb",
    "a name of 100 bits": b"}" + number(2**100) + b"K\1s",
    "many levels": b"]" * 100 + b"a" * 99,
    "a module in the old form": b"(" + text("module") + name("os", "system") + text("x") + text("y") + b"K\1tQ",
}
K1 = b"K\1\x85"
TENSORS = {
    "more numbers than the file has": tensor(b"M\xff\xff", b"M\xff\xff\x85", K1),
    "a shape larger than the storage": tensor(bytes_of(16), LONG + b"\x85", K1),
    "a shape by stride 0": tensor(bytes_of(16), LONG + b"\x85", b"K\0\x85"),
    "a start behind the end": tensor(bytes_of(16), K1, K1, offset=LONG),
    "an empty one of 2**40 rows": tensor(b"K\0", number(2**40) + b"K\0\x86", b"K\0K\1\x86"),
    "a negative start": tensor(bytes_of(16), K1, K1, offset=number(-4)),
    "negative numbers": tensor(number(-1), K1, K1),
    "negative strides": tensor(bytes_of(16), b"K\2\x85", number(-9) + b"\x85"),
    "strides without sizes": tensor(bytes_of(16), b")", K1),
    "a shape of text": tensor(bytes_of(16), text("a") + b"\x85", K1),
    "no such storage": call("torch._utils", "_rebuild_tensor_v2", storage(bytes_of(16), key="nope") + b"K\0))\x89N"),
    "a storage of a type of its own": call(
        "torch._utils",
        "_rebuild_tensor_v2",
        b"("
        + text("storage")
        + holding(_dtype=name("torch", "uint8"), dtype=name("torch", "float64"))
        + text("0")
        + text("cpu")
        + bytes_of(16)
        + b"tQK\0K\x10\x85K\1\x85\x89N",
    ),
    "a shape without end": call(
        "torch._utils", "_rebuild_tensor_v2", storage(bytes_of(16)) + b"K\0" + ENDLESS + K1 + b"\x89N"
    ),
    "the same bytes as two kinds": tensor(bytes_of(16), bytes_of(16) + b"\x85", K1)
    + b"0"
    + call("torch._utils", "_rebuild_tensor_v2", storage(bytes_of(8), kind="DoubleStorage") + b"K\0))\x89N"),
    "a list for a storage": call("torch._utils", "_rebuild_tensor_v2", b"]K\0))\x89N"),
}
PROGRAMS = {
    **{f"gadget: {what}": state(program) for what, program in GADGETS.items()},
    **{f"tensor: {what}": state(b"N", weights=weights(program)) for what, program in TENSORS.items()},
    "a name that forges a line": state(b"K\1", weights=b"}" + text("a\nadmin_fairseq: error: b\x1b[31m") + b"K\1s"),
    "a global that forges a line": state(name("os\x1b[31m", "system")),
    "nothing": b"",
    "half": state(SYSTEM)[:20],
    "no checkpoint": b"\x80\x02K\1.",
    "deep": b"\x80\x02" + b"(" * 20_000 + b"t" * 20_000 + b".",
}
GOOD = state(b"K\1", weights=weights(tensor(bytes_of(16), bytes_of(16) + b"\x85", K1)))


def _legacy(program: bytes) -> bytes:
    """As before torch 1.6: the magic number, the protocol, what machine it was, and the state."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}})
    return b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps([], 2)


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as file:
        for member in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(member)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(info)
    return out.getvalue()


def _tar_bomb() -> bytes:
    """Compressed, with a name of 400 MiB."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 400 << 20
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + 41 * gzip.compress(b"\0" * (10 << 20), 1)


def _overlapping() -> bytes:
    """Many names for the same bytes."""
    content, out = b"\0" * 4096, io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", GOOD)
        file.writestr("archive/data/0", content)
        info = file.getinfo("archive/data/0")
        for key in range(1, 2000):
            copied = zipfile.ZipInfo(f"archive/data/{key}")
            copied.header_offset, copied.file_size, copied.compress_size = info.header_offset, 4096, 4096
            copied.CRC = info.CRC
            file.filelist.append(copied)
            file.NameToInfo[copied.filename] = copied
        file._didModify = True
    return out.getvalue()


class _Writes(torch.nn.Module):
    """Writes a file when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.x = 1
        self.file = torch.zeros(1, dtype=torch.uint8)  # or TorchScript would leave the writing out

    @torch.jit.export
    def __getstate__(self) -> Tuple[int, bool]:  # noqa: UP006  (of TorchScript)
        return self.x, self.training

    @torch.jit.export
    def __setstate__(self, state: Tuple[int, bool]) -> None:  # noqa: UP006
        self.x, self.training = state
        self.file = torch.from_file("proof", True, 16, dtype=torch.uint8).fill_(65)

    def forward(self) -> int:
        return self.x


def _torchscript() -> bytes:
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(_Writes()), out)
    return out.getvalue()


def _two_tables(hidden: bytes) -> bytes:
    """An archive whose locator points to ``hidden``'s table of contents, and another one, just before the locator.

    Python's zipfile reads the second, torch the first.
    """

    def end(entries: int, size: int, start: int) -> bytes:
        return b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, entries, entries, size, start)

    with zipfile.ZipFile(io.BytesIO(hidden)) as file:
        start, entries = file.start_dir, len(file.infolist())
    stops = [place for place in (hidden.rfind(b"PK\6\6"), hidden.rfind(b"PK\5\6")) if place >= start]
    out = hidden[: min(stops)]
    first = len(out)
    out += end(entries, first - start, start)
    table = b""
    shown = {"archive/data.pkl": b"x", "archive/version": b"3\n"}
    for member, content in shown.items():
        common = struct.pack("<HHHHIIIHH", 0, 0, 0, 33, zlib.crc32(content), len(content), len(content), len(member), 0)
        table += b"PK\1\2" + struct.pack("<HH", 20, 20) + common
        table += struct.pack("<HHHII", 0, 0, 0, 0, len(out)) + member.encode()
        out += b"PK\3\4" + struct.pack("<H", 20) + common + member.encode() + content
    out += table + end(len(shown), len(table), len(out))
    out += b"PK\6\7" + struct.pack("<IQI", 0, first, 1)
    return out + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a compressed archive": lambda: archive(GOOD, {"0": b"\0" * 10**7}, kind=zipfile.ZIP_DEFLATED),
    "a zip bomb": lambda: archive(GOOD, {str(key): b"\0" * 10**7 for key in range(9)}, kind=zipfile.ZIP_DEFLATED),
    "overlapping parts": _overlapping,
    "TorchScript": _torchscript,
    "TorchScript behind a second table": lambda: _two_tables(_torchscript()),
    "a zip bomb behind a second table": lambda: _two_tables(
        archive(GOOD, {str(key): b"\0" * 10**7 for key in range(9)}, kind=zipfile.ZIP_DEFLATED)
    ),
    "TorchScript's mark": lambda: archive(GOOD, constants_pkl=SYSTEM),
    "tar": _tar,
    "a tar bomb": _tar_bomb,
    "half an archive": lambda: archive(GOOD)[:-40],
    "an archive without a state": lambda: archive(GOOD).replace(b"data.pkl", b"atad.pkl"),
    "text": lambda: b"not a checkpoint",
    "zeros": lambda: b"\0" * 4096,
    "PK": lambda: b"PK",
}


def files() -> dict[str, Callable[[], bytes]]:
    """Every hostile file by what it does."""
    found = dict(ARCHIVES)
    for what, program in PROGRAMS.items():
        found[what] = lambda program=program: archive(program)
        found[f"{what}, as before torch 1.6"] = lambda program=program: _legacy(program)
    return found
