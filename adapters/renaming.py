"""The two renames that plain `os` lacks: swap two paths in one step, and refuse to replace.

Linux has both in renameat2; where it (or the file system) does not, the nearest safe thing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

from moezoo.adapters.portable import c_function

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_new(old: Path, new: Path) -> None:
    """Rename, but never over something that exists; an empty directory gives way.

    Raises FileExistsError.
    """
    with contextlib.suppress(OSError):
        os.rmdir(new)  # succeeds for an empty directory only
    if _renameat2(old, new, _NOREPLACE):
        return
    if old.is_dir():
        if os.path.lexists(new) and not new.is_dir():
            raise FileExistsError(errno.EEXIST, "exists", str(new))
        try:
            os.rename(old, new)  # refuses a directory that is not empty
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, "exists", str(new)) from None
            raise
    else:
        os.link(old, new)
        os.unlink(old)


def exchange(new: Path, target: Path, *, aside: Path) -> None:
    """Swap `new` and `target` in one step, so that `new` holds what the target was.

    Without kernel support the target is moved `aside` first; a kill between the two renames leaves
    both whole, and the next save finishes the job.
    """
    if _renameat2(new, target, _EXCHANGE):
        return
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, new)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Whether the kernel did it. Raises OSError when it can but the rename failed."""
    call = _kernel_call()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(new))


@functools.cache
def _kernel_call() -> Callable[..., int] | None:
    path = (ctypes.c_int, ctypes.c_char_p)
    return c_function("renameat2", *path, *path, ctypes.c_uint)
