"""Whether what a command makes can be written where the user wants it: asked before the work begins."""

import os
from pathlib import Path


def check_folder(folder: Path, name: str) -> None:
    """ValueError, which begins with `name`, unless the folder is there, or can be made, and may be written to."""
    place = folder.absolute()
    found = next(each for each in (place, *place.parents) if each.exists())
    if not found.is_dir():
        raise ValueError(f"{name}: {found} is no folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: not allowed to write to {found}")


def check_file(path: Path, name: str) -> None:
    """ValueError or FileNotFoundError, which begins with `name`, unless its folder is there and takes the file."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no such folder: {folder}")
    if path.is_dir():
        raise ValueError(f"{name}: must be a file, {path} is a folder")
    check_folder(folder, name)
