"""What the command line writes besides models: what it says, and the files that are asked for. Disks may be full."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

# What the system says when something cannot be written, of which it gives no name.
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def speaking(answer: Callable[[], int]) -> int:
    """Runs a command, and sees to it that all it says is written.

    Args:
      answer: the command; it gives the exit code.

    Returns:
      The exit code; 1 if the standard output cannot be written.
    """
    try:
        code = answer()
        if sys.stdout is not None:
            sys.stdout.flush()  # what does not fit on a disk shows here, and not when Python ends
        return code
    except BrokenPipeError:
        pass
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITTEN:
            raise
        print(f"tadrop: the standard output cannot be written: {error.strerror}", file=sys.stderr)
    if sys.stdout is not None:  # what is left in it would be tried again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


@contextlib.contextmanager
def asked_for(file: Path):
    """Names a file that cannot be written to its end, as on a full disk, and leaves no part of it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
            if file.is_file():  # and no device
                file.unlink()
        raise
