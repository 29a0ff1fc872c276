"""Whether a folder can be written to, tried before anything is computed for it."""

import tempfile
from pathlib import Path


def check_writable(folder: Path, key: str = "results") -> None:
    """Try whether `folder`, the value of a key, can be made and written to, without making it.

    Raises:
        OSError: it cannot.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"{key}: cannot write to {folder}: {there} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = f"{there} is not writable ({error.strerror or error})"
        raise PermissionError(f"{key}: cannot write to {folder}: {reason}") from error
