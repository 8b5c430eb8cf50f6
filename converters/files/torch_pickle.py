"""Checkpoints of `torch.save` (.bin, .pth, .pt), read without torch and without running anything that is in them.

Such a file is a pickle beside raw storages: a zip archive (`data.pkl`, `data/KEY`) since torch 1.6, five pickles and
the storages one after another before. A pickle is a program; what it may do is call things by their names. Here a name
stands for one of the few functions below that describe a tensor, or for something inert, and any other name ends the
reading. Storages of the zip format are mapped into memory, not read.
"""

import mmap
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.errors import ConversionError
from converters.files.archive import data_offset, unpacked
from converters.files.mapped import mapped
from converters.leaves import Leaf

_MAX_PICKLE = 1 << 28
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

_STORAGES = {
    "Float": np.float32, "Double": np.float64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Long": np.int64,
    "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    "ComplexFloat": np.complex64, "ComplexDouble": np.complex128,
}  # fmt: skip
_DTYPES = {
    "float32": np.float32, "float64": np.float64, "double": np.float64, "float": np.float32, "float16": np.float16,
    "half": np.float16, "bfloat16": ml_dtypes.bfloat16, "int64": np.int64, "long": np.int64, "int32": np.int32,
    "int": np.int32, "int16": np.int16, "short": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
    "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64, "complex64": np.complex64,
    "complex128": np.complex128, "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz, "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


class _Kind(NamedTuple):
    """A storage class or a dtype of torch; `dtype` is None for storages without a type of their own."""

    dtype: np.dtype | None


class _Storage(NamedTuple):
    """Raw bytes in the file. In the old format the place is known only after the pickle was read."""

    key: str
    dtype: np.dtype | None
    nbytes: int


class _Described(NamedTuple):
    """A tensor that the pickle describes; sizes, offset and strides count entries."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


class _Inert:
    """Stands for an object that is no tensor (options, counters): takes everything, does nothing."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs): ...

    def __setstate__(self, state): ...

    def __setitem__(self, key, value): ...

    def append(self, value): ...

    def extend(self, values): ...


class _Function:
    """One of the functions that a pickle may call. Unlike a function, it has nothing that a pickle could set."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args):
        return self._call(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("it sets attributes of functions")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it sets attributes of functions")


def _rebuild_tensor(storage, offset, shape, strides, *rest, dtype=None) -> _Described:
    kind = dtype.dtype if isinstance(dtype, _Kind) else storage.dtype if isinstance(storage, _Storage) else None
    counts = (offset, *shape, *strides)
    if kind is None or len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in counts):
        raise pickle.UnpicklingError("a tensor is described by something else than storage, offset, sizes and strides")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * kind.itemsize > storage.nbytes:
        raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} reaches beyond its storage {storage.key!r}")
    return _Described(storage, offset, tuple(shape), tuple(strides), kind)


def _rebuild_tensor_v3(storage, offset, shape, strides, grad, hooks, dtype, *rest) -> _Described:
    return _rebuild_tensor(storage, offset, shape, strides, dtype=dtype)


def _same(value, *rest):
    return value


_TORCH_UTILS = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor_v3,
    "_rebuild_parameter": _same,
    "_rebuild_parameter_with_state": _same,
}
# Not tensors, but common beside them: options of the training run, NumPy scalars such as the best accuracy.
_IGNORED = {
    ("argparse", "Namespace"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    ("torch", "device"),
}


# Extensions, out-of-band buffers, bytearrays: torch.save writes none.
_REFUSED = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "BYTEARRAY8"}


def _check(stream) -> None:
    """Goes through the instructions without following them, up to the end of one pickle.

    Refused is what torch does not write, and a number under which a value is kept that is higher than there are
    instructions: the unpickler would make a table of that many places.
    """
    for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
        far = code.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count
        if far or code.name in _REFUSED:
            raise pickle.UnpicklingError(f"it has the instruction {code.name} {argument}")


class _Unpickler(pickle.Unpickler):
    """Gives names their meaning; what has none is refused before anything is called."""

    def __init__(self, stream, file: Path, storages: dict[str, int] | None):
        super().__init__(stream, encoding="utf-8")
        self.file, self.storages = file, storages
        self.asked: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _TORCH_UTILS:
            return _Function(_TORCH_UTILS[name])
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return _Function(tuple)
        if module == "torch" and name.removesuffix("Storage") in _STORAGES:
            return _Kind(np.dtype(_STORAGES[name.removesuffix("Storage")]))
        if module == "torch" and name in _DTYPES:
            return _Kind(np.dtype(_DTYPES[name]))
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Kind(None)
        if (module, name) in _IGNORED:
            return _Inert
        raise ConversionError(
            f"{self.file}: the pickle holds code: it asks for {module}.{name}. Nothing was run; only tensors are read "
            "from pickles. If you trust the file, load it in torch and save its state_dict alone."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _Kind)):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        if type(pid[2]) not in (str, int):
            raise pickle.UnpicklingError("a storage is called by something else than a name")
        key, dtype = str(pid[2]), pid[1].dtype
        if type(pid[4]) is not int or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("it refers to a part of a storage")
        nbytes = pid[4] * (1 if dtype is None else dtype.itemsize)
        if self.storages is not None and self.storages.get(key, -1) < nbytes:
            held = self.storages.get(key)
            raise pickle.UnpicklingError(
                f"storage {key!r} is missing" if held is None else f"storage {key!r} is truncated"
            )
        storage = _Storage(key, dtype, nbytes)
        if self.asked.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key!r} has two sizes or dtypes")
        return storage


def read(file: Path) -> dict[str, Leaf]:
    """The tensors of the model in a checkpoint.

    Args:
        file: what `torch.save` wrote: a state dict, or one nested under `model`, `state_dict`, `module` and the like.

    Returns:
        Leaves by name; a prefix `module.` (of DataParallel) or `_orig_mod.` (of torch.compile) that all have is taken
        off.

    Raises:
        ConversionError: the pickle holds code (it is not run), the file is damaged, or there is no state dict in it.
    """
    try:
        with open(file, "rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
        value, place = _read_zip(file) if zipped else _read_legacy(file)
        found = _state_dict(value)
    except ConversionError:
        raise
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error
    except zipfile.BadZipFile as error:
        raise ConversionError(f"{file}: the archive is truncated or damaged: {error}.") from None
    except Exception as error:
        raise ConversionError(f"{file}: is no torch pickle that can be read, or is damaged: {error}.") from None
    if not found:
        raise ConversionError(f"{file}: there is no state dict in this pickle.")
    tensors = {name: place(tensor) for name, tensor in found.items()}
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _read_zip(file: Path) -> tuple[Any, Callable[[_Described], Leaf]]:
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in infos if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ConversionError(f"{file}: is a zip archive, but not one of torch.save: it holds no data.pkl.")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in infos:
            raise ConversionError(f"{file}: is a TorchScript archive, which is code; save the model's state_dict.")
        if root + "byteorder" in infos and archive.read(root + "byteorder") != b"little":
            raise ConversionError(f"{file}: was written by a big-endian machine, which is not supported.")
        begin = root + "data/"
        storages = {n.removeprefix(begin): info.file_size for n, info in infos.items() if n.startswith(begin)}
        if infos[pickles[0]].file_size > _MAX_PICKLE:
            raise ConversionError(f"{file}: its pickle has {infos[pickles[0]].file_size} bytes: it is not of weights.")
        with archive.open(pickles[0]) as stream:
            _check(stream)
        with archive.open(pickles[0]) as stream:
            value = _Unpickler(stream, file, storages).load()
    offsets: dict[str, int] = {}

    def place(tensor: _Described) -> Leaf:
        key = tensor.storage.key
        info = infos[begin + key]
        if info.compress_type != zipfile.ZIP_STORED:
            return _unpacked(file, info, tensor)
        if key not in offsets:
            offsets[key] = data_offset(file, info)
        return _leaf(file, offsets[key], tensor)

    return value, place


def _unpacked(file: Path, info: zipfile.ZipInfo, tensor: _Described) -> Leaf:
    """A tensor of a compressed archive (torch writes none): its storage is unpacked each time, as far as needed."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))

    def read() -> np.ndarray:
        if 0 in tensor.shape:
            return np.empty(tensor.shape, tensor.dtype)
        data = unpacked(file, info, (tensor.offset + last + 1) * tensor.dtype.itemsize)
        flat = np.frombuffer(data, np.uint8)[tensor.offset * tensor.dtype.itemsize :].view(tensor.dtype)
        steps = [s * tensor.dtype.itemsize for s in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, steps, writeable=False)

    return Leaf(tensor.shape, tensor.dtype, read)


def _leaf(file: Path, begin: int, tensor: _Described) -> Leaf:
    strides, expected = None, 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            strides = tensor.strides
        expected *= size
    return mapped(file, begin + tensor.offset * tensor.dtype.itemsize, tensor.dtype, tensor.shape, strides)


def _read_legacy(file: Path) -> tuple[Any, Callable[[_Described], Leaf]]:
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # From the mapping, so that the position after a pickle is exactly its end.

        def next_value(unpickler: _Unpickler | None = None) -> Any:
            begin = data.tell()
            _check(data)
            data.seek(begin)
            return (unpickler or _Unpickler(data, file, {})).load()

        if next_value() != _LEGACY_MAGIC or next_value() != _LEGACY_VERSION:
            raise pickle.UnpicklingError("it does not begin as torch.save begins")
        next_value()  # sizes of integers on the machine that wrote it
        unpickler = _Unpickler(data, file, None)
        value = next_value(unpickler)
        keys = [str(key) for key in next_value()]
        offsets, end = {}, len(data)
        for key in keys:
            storage = unpickler.asked.get(key)
            if storage is None or storage.dtype is None:
                raise pickle.UnpicklingError(f"storage {key!r} belongs to no tensor")
            begin = data.tell() + 8
            if begin > end or begin + storage.nbytes > end:
                raise ConversionError(f"{file}: the file is truncated in storage {key!r}.")
            if int.from_bytes(data.read(8), "little") * storage.dtype.itemsize != storage.nbytes:
                raise pickle.UnpicklingError(f"storage {key!r} has another size than its tensors say")
            offsets[key] = begin
            data.seek(begin + storage.nbytes)

    def place(tensor: _Described) -> Leaf:
        if tensor.storage.key not in offsets:
            raise ConversionError(f"{file}: storage {tensor.storage.key!r} is missing.")
        return _leaf(file, offsets[tensor.storage.key], tensor)

    return value, place


_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "params", "weights")


def _state_dict(value: Any) -> dict[str, _Described] | None:
    """The tensors of a mapping, or those of the first mapping under a usual name, if these are as many."""
    if not isinstance(value, dict):
        return None
    # Of dict itself: a pickle may give an OrderedDict attributes, which would go before its methods.
    own = {name: v for name, v in dict.items(value) if isinstance(v, _Described) and isinstance(name, str)}
    nested = next((found for key in _NESTED if (found := _state_dict(dict.get(value, key))) is not None), None)
    # Beside the state dict of a model there may be single tensors, such as the best accuracy.
    return own if len(own) > len(nested or ()) else nested
