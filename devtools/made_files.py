"""What a server has made so far: LoRAs and pictures in its output folder, copied before that folder is removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".safetensors", ".html", ".csv", ".png", ".jpg", ".webp")
WORKING_FILES = ("residuals", "runs", "probes", "latents")  # in output/blockskip: of no use without the server


class MadeFiles:
    """The files in a server's output folder that its user wants to keep.

    Args:
        source: The server's output folder.
        target: Where copies go, in the same folders as in `source`.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self._done: set[Path] = set()

    def leave_out_present(self) -> None:
        """Never copy the files that there are now, because they were shown in another way."""
        self._done.update(self._wanted())

    def copy_new(self) -> list[str]:
        """Copy the files that are new since the last call; return their names below `target`."""
        names = []
        for file in list(self._wanted()):
            name = file.relative_to(self.source)
            copy = self.target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
            self._done.add(file)
            names.append(name.as_posix())
        return names

    def _wanted(self) -> Iterator[Path]:
        for file in sorted(self.source.rglob("*")):
            parts = file.relative_to(self.source).parts
            works = parts[0] == "blockskip" and parts[1:2] and parts[1] in WORKING_FILES
            if file.suffix in SUFFIXES and file.is_file() and not works and file not in self._done:
                yield file
