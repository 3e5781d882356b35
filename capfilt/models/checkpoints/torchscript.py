"""The tensors of a TorchScript archive, such as OpenAI's CLIP, read without running any of its code.

`torch.jit.load` compiles and links what such a file brings along. Here its pickle goes through an unpickler that knows
tensors, containers and nothing else: the archive's own classes become empty objects that hold attributes.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_PICKLE, MAX_CODE = 64 * 2**20, 16 * 2**20
"""Bytes of the pickle and of the code that are read; OpenAI's archives have less than one of each."""
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, and not a checkpoint in the same container."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def tensors(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names, as `state_dict` of the loaded module would have them.

    Raises:
        pickle.UnpicklingError: anything but tensors and containers in it.
        ValueError: an archive that is damaged, or whose tensors claim more than the file holds.
    """
    with zipfile.ZipFile(path) as archive:
        home = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix(
            "constants.pkl"
        )
        unpickler = _Unpickler(archive, home)
        with archive.open(_bounded(archive, f"{home}data.pkl", MAX_PICKLE)) as file:
            root = unpickler.read(file)
    named: dict[str, Tensor] = {}
    waiting, seen = [("", root)], set[int]()
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                named[prefix + name] = value
            elif isinstance(value, unpickler.module):
                waiting.append((f"{prefix}{name}.", value))
    return named


def code(path: Path) -> str:
    """The source text that an archive brings along, to be looked at and never run."""
    with zipfile.ZipFile(path) as archive:
        sources = [name for name in archive.namelist() if "/code/" in name and name.endswith(".py")]
        return "\n".join(archive.read(_bounded(archive, name, MAX_CODE)).decode(errors="replace") for name in sources)


def _bounded(archive: zipfile.ZipFile, name: str, most: int) -> zipfile.ZipInfo:
    info = archive.getinfo(name)
    if info.file_size > most:
        raise ValueError(f"{name} has {info.file_size} bytes; allowed are {most}")
    return info


class _Unpickler:
    """What is made of an archive's pickle. All that it can be made to call is below, and is new for each file."""

    def __init__(self, archive: zipfile.ZipFile, home: str) -> None:
        self.archive, self.home = archive, home
        self.module: type = type("Module", (), {})
        self.storages: dict[str, Tensor] = {}
        self.known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            ("collections", "OrderedDict"): lambda *pairs: OrderedDict(*pairs),
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
        }

    def read(self, file: Any) -> Any:
        """The root object. The unpickler in Python: that in C allocates whatever index of its memo a file names."""
        python: Any = pickle._Unpickler(file)
        python.find_class, python.persistent_load = self._find, self._storage
        return python.load()

    def _find(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.module
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.known[module, name]

    def _storage(self, described: Any) -> Tensor:
        kind, dtype, key, _, count = described
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"GLOBAL {kind}")
        if key not in self.storages:
            info = self.archive.getinfo(f"{self.home}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
                raise ValueError(f"data/{key} has {info.file_size} bytes for {count} of {dtype}")
            data = bytearray(self.archive.read(info))
            self.storages[key] = (
                torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
            )
        return self.storages[key]


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, refused where it claims more elements than there are."""
    view = torch.as_strided(storage, tuple(size), tuple(stride), offset)
    if view.numel() > storage.numel():
        raise ValueError(f"a tensor of {tuple(size)} in {storage.numel()} numbers")
    return view
