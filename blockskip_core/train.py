"""``python -m blockskip_core.train run.json``, in the pack's folder: train from a run file. See ``runs.command``.

``python FOLDER/blockskip_core/train.py run.json`` does the same from anywhere, also with a Python that has not the current
folder on its path, as in ComfyUI's portable version. A program of its own calls ``runs.command.main``. Importing this
module would hide the package's function ``train``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def _package_of_file() -> str:
    """Put the pack's folder on Python's path, and return this package's name.

    It replaces this file's own folder, which Python puts there and whose modules would hide others: ``files``, ``model``.
    """
    folder = Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0]).resolve() == folder:
        del sys.path[0]
    sys.path.insert(0, str(folder.parent))
    return folder.name


def _main() -> int:
    if not __package__:  # started as a file
        return int(import_module(f"{_package_of_file()}.runs.command").main())
    from .runs.command import main

    return main()


if __name__ == "__main__":
    sys.exit(_main())
