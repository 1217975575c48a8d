"""Files that a run file names: only inside the folders that the user has named on the command line.

A run file may come from anybody. So a name in it is a relative path, written with "/" or "\\" whatever the system; it
has no drive, no "..", no leading separator; and what it leads to, links included, is inside one of the named folders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidInputError


@dataclass(frozen=True)
class NamedFolders:
    """Folders that may be read.

    Attributes:
        folders: The folders, searched in this order.
        option: The option of the command line that names them, for messages.
    """

    folders: Sequence[Path]
    option: str

    def file(self, name: str) -> Path:
        """Return the file of this name, by this name: where links lead, files may have other names, or no suffix.

        Raises:
            InvalidInputError: If the name could lead out of the folders, or there is no such file.
        """
        found = self._found(name, _parts(name, self.option))
        self._require_inside(found, name)
        return found

    def folder_with(self, name: str, file: str, *folders: str) -> Path:
        """Return the folder of this name that has a file.

        Args:
            name: Its name.
            file: The file's name in it.
            folders: Folders in it that will be read too, if they exist, with all that is in them.

        Raises:
            InvalidInputError: As :meth:`file`, for any of the files.
        """
        root = self.file(f"{name}/{file}").parent
        for folder in folders:
            for path in [root / folder, *sorted((root / folder).rglob("*"))]:
                self._require_inside(path, f"{name}/{path.relative_to(root).as_posix()}")
        return root

    def _require_inside(self, path: Path, name: str) -> None:
        inside = path.resolve()
        if not any(inside.is_relative_to(folder.resolve()) for folder in self.folders):
            raise InvalidInputError(
                f"{name} is a link to {inside}, outside the folders named with {self.option}. Name that folder too, if "
                "it may be read."
            )

    def _found(self, name: str, parts: Sequence[str]) -> Path:
        for folder in self.folders:
            candidate = folder.joinpath(*parts)
            if candidate.is_file():
                return candidate
        places = ", ".join(map(str, self.folders)) or "none are named"
        raise InvalidInputError(
            f"There is no file {name} in the folders named with {self.option} ({places}). Name the folder that has it."
        )


def _parts(name: str, option: str) -> list[str]:
    parts = re.split(r"[/\\]", name)
    if not name.isprintable() or ":" in name or any(not part.strip(" .") for part in parts):
        raise InvalidInputError(
            f"The run file names {name!r}, which could lead out of the folders named with {option}. It must be a plain "
            "path such as flux/model.safetensors: no drive, no .. and no leading /."
        )
    return parts
