"""Writing: shards of safetensors, filled block by block in `<out>.partial`, that get their name at the end.

`journal` says what an interruption leaves behind.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from converters.errors import reading
from converters.files import header
from converters.files.safetensors import INDEX, SINGLE, index, shard_name, split
from converters.files.sidecars import beside
from tadrop_jax import __version__
from tadrop_jax.checkpoints.safetensors import journal
from tadrop_jax.errors import CheckpointError, checkpoint_errors

Plan = Mapping[str, tuple[np.dtype, tuple[int, ...]]]

# What is written goes on to the disk after so many bytes, and so many seconds, while the rest is computed.
_SYNC_BYTES, _SYNC_SECONDS = 64 << 20, 30.0
# Which transformers asks for.
_METADATA = {"format": "pt"}


class _Shard(NamedTuple):
    name: str
    head: bytes
    entries: dict[str, header.Entry]

    @property
    def size(self) -> int:
        return len(self.head) + sum(entry.nbytes for entry in self.entries.values())


class Sink:
    """An output under construction, made by `open_sink`; threads may share it.

    Leaving a `with` block without `finish` keeps the work for a later `resume`.

    Attributes:
        out: where the result will appear.
        partial: the directory where it is built.
        plan: dtype and shape of each tensor.
        done: names of the tensors that are complete.
    """

    def __init__(self, out: Path, plan: Plan, shards: list[_Shard], fingerprint: str, resume: bool):
        self.out, self.plan, self.done = out, plan, set[str]()
        self.partial = out.with_name(out.name + ".partial")
        self._shards, self._fds, self._lock = shards, dict[str, int](), threading.Lock()
        self._home = {name: shard for shard in shards for name in shard.entries}
        self._journal = -1
        self._syncer, self._syncing = ThreadPoolExecutor(1, "sync"), Future[None]()
        self._syncing.set_result(None)
        self._unsynced, self._synced_at = 0, time.monotonic()
        layout = hashlib.sha256(b"".join(shard.name.encode() + shard.head for shard in shards)).hexdigest()
        identity = {"fingerprint": fingerprint, "layout": layout, "version": __version__}
        resumed = True  # Until it is known: what an earlier run left is not for an error to delete.
        try:
            resumed = self._open_journal(identity, resume)
            for shard in shards:
                self._fds[shard.name] = _open_shard(self.partial / shard.name, shard, resumed)
        except BaseException as error:
            self.close() if resumed else self.discard()
            if isinstance(error, OSError):
                raise _cannot_write(error, self.partial) from error
            raise

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Writes consecutive entries of a tensor.

        Args:
            name: the tensor.
            start: the first entry, in the row-major flattened tensor.
            array: the entries in row-major order, of the planned dtype: nothing is converted.

        Raises:
            CheckpointError: when the disk is full or the file cannot be written.
            TypeError: when the dtype is not the plan's.
            IndexError: when the entries lie outside the tensor.
        """
        shard = self._home[name]
        entry = shard.entries[name]
        array = np.ascontiguousarray(array).reshape(-1)
        if array.dtype != entry.dtype:
            raise TypeError(f"{name!r} is planned as {entry.dtype}, got {array.dtype}.")
        if start < 0 or start + array.size > math.prod(entry.shape):
            raise IndexError(f"entries {start}:{start + array.size} of {name!r}, planned with shape {entry.shape}.")
        if not array.size:
            return
        rest = array.view(np.uint8).data
        offset = len(shard.head) + entry.begin + start * entry.dtype.itemsize
        try:
            while rest:
                put = os.pwritev(self._fds[shard.name], [rest], offset)
                rest, offset = rest[put:], offset + put
        except OSError as error:
            raise _cannot_write(error, self.partial / shard.name) from error

    def mark_done(self, name: str) -> None:
        """Records that a tensor has been written whole (`journal` says what that guarantees).

        Args:
            name: the tensor.

        Raises:
            CheckpointError: when the journal cannot be written, or what was written before not reach the disk.
        """
        dtype, shape = self.plan[name]
        with self._lock:
            self.done.add(name)
            self._log({"done": name})
            self._unsynced += math.prod(shape) * dtype.itemsize
            due = self._unsynced > _SYNC_BYTES or time.monotonic() - self._synced_at > _SYNC_SECONDS
            if due and self._syncing.done():
                self._syncing.result()
                self._log({"syncing": len(self.done)})
                self._unsynced, self._synced_at = 0, time.monotonic()
                self._syncing = self._syncer.submit(self._sync)

    def add_file(self, name: str, data: bytes | Path) -> None:
        """Puts a file beside the tensors; beside a single file `x.safetensors` it is called `x.<name>`.

        Args:
            name: a file name, or a '/'-joined path below the directory.
            data: its contents, or a file to copy.

        Raises:
            CheckpointError: when the name is taken or leads elsewhere, or when a file cannot be read or written.
        """
        parts = PurePosixPath(name).parts
        taken = {journal.NAME, INDEX, *(shard.name for shard in self._shards)}
        if not parts or parts[0] == "/" or ".." in parts or name in taken:
            raise CheckpointError(f"{self.out}: a file named {name!r} cannot be put there.")
        if isinstance(data, Path):
            with checkpoint_errors(), reading(data):
                data = data.read_bytes()
        try:
            (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
            (self.partial / name).write_bytes(data)
        except OSError as error:
            raise _cannot_write(error, self.partial / name) from error

    def finish(self, without: Collection[str] = ()) -> None:
        """Makes everything durable and lets the result appear under its name.

        Args:
            without: files of the partial directory that go when the result is there.

        Raises:
            CheckpointError: when a tensor was not marked done, `out` was filled meanwhile, or the disk fails.
        """
        missing = [name for name in self.plan if name not in self.done]
        if missing:
            raise CheckpointError(
                f"{self.partial}: {len(missing)} tensors are unfinished, the first is {missing[0]!r}."
            )
        passing = {journal.NAME, *without}
        try:
            if self._shards[0].name != SINGLE:
                (self.partial / INDEX).write_text(self._index())
            self._syncing.result()
            self._sync_data()
            for path in [*self.partial.rglob("*"), self.partial]:
                _fsync_path(path)
            _refuse_occupied(self.out)
            if self.out.suffix == ".safetensors":
                files = (file for file in self.partial.rglob("*") if file.is_file())
                self._move_file({file for file in files if file.name not in passing | {*self._fds}})
                shutil.rmtree(self.partial)
            else:
                self.partial.rename(self.out)
                for name in passing:
                    (self.out / name).unlink(missing_ok=True)
            _fsync_path(self.out.parent)
        except OSError as error:
            raise _cannot_write(error, self.out) from error
        self.close()

    def _move_file(self, others: Collection[Path]) -> None:
        """Moves the one file to its name, and first what stands beside it."""
        files = {file.relative_to(self.partial).as_posix(): file for file in others}
        check_beside(self.out, files)
        for file, to in ((file, beside(self.out, name)) for name, file in files.items()):
            file.rename(to)
        (self.partial / self._shards[0].name).rename(self.out)

    def discard(self) -> None:
        """Stops and deletes the partial directory."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Closes the files; without effect after `finish` or `discard`."""
        self._syncer.shutdown()
        while self._fds:
            os.close(self._fds.popitem()[1])
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _index(self) -> str:
        total = sum(entry.nbytes for shard in self._shards for entry in shard.entries.values())
        return index({name: shard.name for name, shard in self._home.items()}, total)

    def _open_journal(self, identity: dict[str, str], resume: bool) -> bool:
        """Takes the partial directory for this process; True when there is work to go on from."""
        file = self.partial / journal.NAME
        if self.partial.exists():
            if not file.exists():
                raise CheckpointError(f"{self.partial}: exists and is not an unfinished merge; move it away first.")
            self._journal = journal.lock(file)
            lines = journal.complete_lines(file)
            if resume and lines:
                if lines[0] != identity:
                    raise journal.not_resumed(self.partial, lines[0].get("version"))
                self.done = journal.trusted(lines)
                self._log({"boot": journal.boot()})
                return True
            shutil.rmtree(self.partial)
            os.close(self._journal)
            self._journal = -1
        self.partial.mkdir(parents=True)
        self._journal = journal.lock(file)
        try:
            self._log(identity)
            self._log({"boot": journal.boot()})
        except CheckpointError:  # a full disk; nothing was done that could be resumed
            self.discard()
            raise
        return False

    def _log(self, record: dict[str, Any]) -> None:
        try:
            os.write(self._journal, json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise _cannot_write(error, self.partial / journal.NAME) from error

    def _sync(self) -> None:
        self._sync_data()
        self._log({"synced": len(self.done)})

    def _sync_data(self) -> None:
        try:
            for fd in self._fds.values():
                os.fsync(fd)
        except OSError as error:
            with contextlib.suppress(CheckpointError):
                self._log({"failed": len(self.done)})
            raise _cannot_write(error, self.partial) from error


def open_sink(
    out: str | os.PathLike[str],
    plan: Plan,
    *,
    max_shard_size: int = 5_000_000_000,
    fingerprint: str = "",
    resume: bool = False,
    among: tuple[int, int] | None = None,
) -> Sink:
    """Starts an output; its files get their full size at once, so that a full disk shows here.

    Files are named as `transformers` names them. Within a file, tensors lie in the order of the plan, wider
    dtypes first, so that each is aligned.

    Args:
        out: a directory that does not exist or is empty, or a path ending in `.safetensors` for one file.
        plan: dtype and shape of each tensor.
        max_shard_size: bytes of tensors in a shard; a larger tensor gets a shard of its own. A single file
            may be of any size.
        fingerprint: identifies the merge, for `resume`.
        resume: go on from what an interrupted run left; `Sink.done` then names the tensors that are complete.
            When False, what such a run left is deleted.
        among: of a result that several sinks write, how many files come before this one's, and how many there are.

    Returns:
        The sink.

    Raises:
        CheckpointError: when `out` is not empty, another process is writing it, what is to be resumed belongs
            to another merge or version of this library, or the disk is full. Nothing new is left behind then.

    Example:
        >>> import tempfile, safetensors.numpy
        >>> out = tempfile.mkdtemp() + "/merged"
        >>> with open_sink(out, {"w": (np.dtype(np.float32), (2, 2))}) as sink:
        ...     sink.write("w", 0, np.ones(4, np.float32))
        ...     sink.mark_done("w")
        ...     sink.finish()
        >>> safetensors.numpy.load_file(out + "/model.safetensors")["w"].sum()
        np.float32(4.0)
    """
    out = Path(out).resolve()
    _refuse_occupied(out)
    if max_shard_size <= 0:
        raise CheckpointError(f"{out}: the size of a shard must be positive, got {max_shard_size}.")
    single = out.suffix == ".safetensors"
    plan = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in plan.items()}
    groups = [list(plan)] if single else split(_sizes(plan), max_shard_size)
    shards = []
    before, of_all = among or (0, len(groups))
    for number, group in enumerate(groups, before + 1):
        wide_first = sorted(group, key=lambda name: -plan[name][0].itemsize)
        with checkpoint_errors():
            encoded = header.encode({name: plan[name] for name in wide_first}, _METADATA)
        shards.append(_Shard(shard_name(number, of_all), *encoded))
    return Sink(out, plan, shards, fingerprint, resume)


def check_beside(out: Path, files: Mapping[str, bytes | Path]) -> None:
    """Refuses a single file `x.safetensors` where other files have the names of those that are to stand beside it.

    Args:
        out: the file.
        files: by name, their contents, or files to copy; what is there already with the same contents will do.

    Raises:
        CheckpointError: naming the one that is in the way.
    """
    for name, data in files.items():
        to = beside(out, name)
        if to.exists() and to.read_bytes() != (data.read_bytes() if isinstance(data, Path) else data):
            raise CheckpointError(f"{to}: exists already, and would be overwritten; move it away.")


def check_directory(out: Path, why: str) -> None:
    """Refuses the name of a single file for what is several.

    Raises:
        CheckpointError: when the path ends in `.safetensors`.
    """
    if out.suffix == ".safetensors":
        raise CheckpointError(f"{out}: {why}, so this must be a directory.")


def count_shards(plan: Plan, max_shard_size: int) -> int:
    """How many files a plan takes."""
    return len(split(_sizes(plan), max_shard_size))


def _sizes(plan: Plan) -> dict[str, int]:
    return {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in plan.items()}


def _refuse_occupied(out: Path) -> None:
    if out.is_dir():
        if out.suffix == ".safetensors":
            raise CheckpointError(f"{out}: is a directory; the result is to be a file of that name.")
        if os.path.ismount(out):
            raise CheckpointError(
                f"{out}: is a mount point, which a result cannot replace; give a directory inside it."
            )
        if any(out.iterdir()):
            raise CheckpointError(f"{out}: the output directory is not empty.")
    elif out.exists():
        raise CheckpointError(f"{out}: the output exists already.")


def _open_shard(file: Path, shard: _Shard, resumed: bool) -> int:
    if resumed:
        with open(file, "rb") if file.exists() else open(os.devnull, "rb") as stream:
            intact = stream.read(len(shard.head)) == shard.head and os.fstat(stream.fileno()).st_size == shard.size
        if not intact:
            raise CheckpointError(f"{file}: is damaged or missing, so it cannot be resumed; start without resume.")
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not resumed:
            _allocate(fd, shard.size)
        os.pwrite(fd, shard.head, 0)  # also of a resumed one: it may be in memory alone, after an fsync that failed
    except BaseException:
        os.close(fd)
        raise
    return fd


def _allocate(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    os.ftruncate(fd, size)


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _cannot_write(error: OSError, path: Path) -> CheckpointError:
    what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written: {error.strerror}"
    return CheckpointError(f"{path}: {what}.")
