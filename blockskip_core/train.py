"""``python -m blockskip_core.train run.json``: train from a run file. See ``runs.command``.

A program of its own calls ``runs.command.main``. Importing this module would hide the package's function ``train``.
"""

from __future__ import annotations

import sys

from .runs.command import main

if __name__ == "__main__":
    sys.exit(main())
