"""Writes what `torch.save` writes, without torch: both formats, with any pickle inside."""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np

_NAMES = {
    "float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage", "int64": "LongStorage",
    "bool": "BoolStorage", "float64": "DoubleStorage",
}  # fmt: skip


class _Named:
    """A class or function of torch that the pickle names; it need not be installed."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Storage:
    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array
        self.kind = _Named("torch", _NAMES[array.dtype.name])


class Call:
    """Pickled as a call of `module.name` with some arguments."""

    def __init__(self, module: str, name: str, *arguments):
        self.function, self.arguments = _Named(module, name), arguments


class _Pickler(pickle._Pickler):
    """Python's own pickler in Python, which lets names be written that cannot be imported."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            numel = obj.array.size
            return ("storage", obj.kind, obj.key, "cpu", numel, *((None,) if self.legacy else ()))
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Named):
            return self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        if isinstance(obj, Call):
            self.save(obj.function)
            self.save(tuple(obj.arguments))
            return self.write(pickle.REDUCE)
        return super().save(obj, save_persistent_id)


def pickled(value, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    pickler = _Pickler(stream, 2)
    pickler.legacy = legacy
    pickler.dump(value)
    return stream.getvalue()


def tensor(array: np.ndarray, key: str = "0", strides=None, offset: int = 0, shape=None, storage=None) -> Call:
    """A tensor as `torch.save` describes it; its storage is the array."""
    storage = storage or Storage(key, array)
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(s // array.itemsize for s in np.zeros(shape, array.dtype).strides)
    hooks = Call("collections", "OrderedDict")
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, hooks)


def _storages(value, found: dict) -> dict:
    if isinstance(value, Storage):
        found[value.key] = value
    elif isinstance(value, Call):
        _storages(value.arguments, found)
    elif isinstance(value, dict):
        _storages(list(value.values()), found)
    elif isinstance(value, list | tuple):
        for part in value:
            _storages(part, found)
    return found


def save_zip(file, value, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        archive.writestr("archive/byteorder", "little")
        for key, storage in _storages(value, {}).items():
            archive.writestr(f"archive/data/{key}", storage.array.tobytes())
        archive.writestr("archive/version", "3\n")


def save_legacy(file, value) -> None:
    storages = _storages(value, {})
    parts = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled({"little_endian": True})]
    parts += [pickled(value, legacy=True), pickled(sorted(storages))]
    for key in sorted(storages):
        array = storages[key].array
        parts += [array.size.to_bytes(8, "little"), array.tobytes()]
    with open(file, "wb") as stream:
        stream.write(b"".join(parts))


def state_dict(tensors) -> OrderedDict:
    return OrderedDict((name, tensor(array, str(i))) for i, (name, array) in enumerate(tensors.items()))
