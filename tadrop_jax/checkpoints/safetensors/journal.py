"""The record of which tensors of an unfinished output are complete: one JSON object a line.

What it guarantees. When the process is killed, every tensor marked done is complete for a resumed run, since
its bytes are the kernel's. When the machine stops, or an fsync fails, only those are that an fsync has covered; the
journal records when one begins, ends or fails, and the boot that it was written in, so that a resumed run trusts no
more than that.
"""

import fcntl
import json
import os
import uuid
from pathlib import Path
from typing import Any

from tadrop_jax import __version__
from tadrop_jax.errors import CheckpointError

NAME = "journal.jsonl"


def lock(file: Path) -> int:
    """Opens the journal for appending; the lock ends with the process, however that ends."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise CheckpointError(f"{file.parent}: another process is writing there.") from error
    except OSError:  # Some network file systems have no locks.
        pass
    return fd


def not_resumed(work: Path, version: str | None) -> CheckpointError:
    """Of unfinished work that is not of the merge that is asked for, or was begun by another version of this library.

    Args:
        work: where it is.
        version: the one that began it, if that is known.
    """
    if version == __version__:
        why = "belongs to another merge (its inputs, method, parameters or output layout differ)"
        advice = "repeat that merge's command"
    else:
        why = f"was begun by {'version ' + version if version else 'an older version'} of tadrop_jax"
        why, advice = f"{why}, and this is version {__version__}", "go on with that version"
    return CheckpointError(f"{work}: {why}, so it cannot be resumed; {advice}, or start afresh without resume.")


def complete_lines(file: Path) -> list[dict[str, Any]]:
    """The records up to the first that was cut off; that one and what follows leave the file."""
    records, intact = [], 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        records.append(record)
        intact += len(line)
    os.truncate(file, intact)
    return records


def trusted(lines: list[dict[str, Any]]) -> set[str]:
    """Names of the tensors that are certainly complete, from the records after the first."""
    safe, fresh, before, written_in = set[str](), set[str](), set[str](), None
    for line in lines[1:]:
        if "done" in line:
            fresh.add(line["done"])
        elif "syncing" in line:
            before = fresh.copy()
        elif "synced" in line:
            safe |= before
        elif "failed" in line:  # what an fsync could not write is the kernel's no more, and it tells that once
            fresh, before, written_in = set(), set(), None
        elif line["boot"] != written_in:
            fresh, before, written_in = set(), set(), line["boot"]
    return safe | fresh if written_in == boot() else safe


def boot() -> str:
    """Names the running kernel's boot; where there is no such name, one that never comes again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid.uuid4().hex
