"""Reads a folder of pictures or videos, with their captions, inside ComfyUI's input folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import folder_paths
from torch import Tensor

from ...data import remarks
from ...data.caption_text import CaptionText, caption_text
from ...data.picture_checks import only_colour
from ...errors import InvalidInputError
from . import film_files
from .film_files import read_film
from .material import TrainingFile
from .picture_files import OTHER_SUFFIXES, SUFFIXES, read_picture
from .reference_files import REPEATED, references_by_name

CAPTION_SUFFIXES = (".txt", ".caption")
"""In order of precedence."""
LARGEST_CAPTION = 64 * 1024
MOST_REPEATS = 1000


@dataclass(frozen=True)
class LoadedFolder:
    """The content of a folder; each list has one element per picture, or several if a picture counts several times.

    Attributes:
        images: IMAGEs of one picture each, or of one film each.
        texts: Captions; "" if there is none.
        files: The same with the files' names.
        remarks: Anything odd, in sentences.
        references: IMAGEs of one reference picture each, those of the first picture first; empty without references.
    """

    images: list[Tensor]
    texts: list[str]
    files: list[TrainingFile]
    remarks: list[str]
    references: list[Tensor] = field(default_factory=list)


def load_training_folder(
    folder: str,
    progress: Callable[[int, int], None],
    *,
    frames: int = 1,
    clips: int = 1,
    reference_folder: str | None = None,
    with_pictures: bool = False,
) -> LoadedFolder:
    """Read the pictures of a folder and its sub-folders, in the order of their names, and their captions.

    Args:
        folder: A folder inside ComfyUI's input folder, named as in ComfyUI's lists.
        progress: Called with (pictures read, total); may raise to interrupt.
        frames: Number of pictures of a clip. With more than one, videos are read instead of pictures.
        clips: Number of clips to read from the beginning of every video.
        reference_folder: Another folder, with one or more references of every picture; see ``reference_files``.
        with_pictures: Whether pictures are read beside videos.

    Raises:
        InvalidInputError: If there is no such folder, it contains nothing to read, one of its files cannot be read, or
            a picture lacks its reference.
    """
    root = input_folder(folder)
    inside = None if reference_folder is None else _reference_folder(reference_folder, root, frames)
    films = film_files.SUFFIXES if frames > 1 else ()
    found = _files_besides(root, (*(SUFFIXES if frames == 1 or with_pictures else ()), *films), inside)
    if not found:
        raise InvalidInputError(_nothing_found(folder, root, frames))
    references = (
        _References({}, None) if inside is None else _References.read(list(found), root, inside, reference_folder or "")
    )
    loaded = [
        _Picture.read(path, root, frames * clips if path.suffix.lower() in films else None)
        for path in _announced(list(found), progress)
    ]
    unread = None if frames > 1 and not with_pictures else _on_unread(root, inside)
    counted = [picture for picture in loaded for _ in range(found[picture.path])]
    return LoadedFolder(
        images=[picture.image for picture in counted],
        texts=[picture.caption.text for picture in counted],
        files=[TrainingFile(picture.name, picture.caption.text) for picture in counted],
        remarks=[*_remarks(loaded), *filter(None, [references.remark, unread])],
        references=[image for picture in counted for image in references.of.get(picture.path, ())],
    )


def _reference_folder(folder: str, root: Path, frames: int) -> Path:
    inside = input_folder(folder)
    if frames > 1:
        raise InvalidInputError(
            f"References are for pictures, and `frames` is {frames}. Set it to 1, or `reference_folder` to none."
        )
    if inside == root:
        raise InvalidInputError(
            "`reference_folder` is the folder of the pictures itself. Choose the folder of the references."
        )
    return inside


@dataclass(frozen=True)
class _References:
    """The references of pictures, and a remark on them."""

    of: dict[Path, list[Tensor]]
    remark: str | None

    @classmethod
    def read(cls, pictures: list[Path], root: Path, inside: Path, folder: str) -> _References:
        candidates = list(_files_besides(inside, SUFFIXES, root))
        files = references_by_name(
            pictures, candidates, folder, lambda path: _shown(path, root), lambda path: _sub_folder(path, root, inside)
        )
        every = [path for of_one in files.values() for path in of_one]
        read = {path: _reference(path, inside) for path in every}
        names = [_shown(path, inside) for path in every]
        white = [index for index, path in enumerate(every) if read[path][1]]
        remark = remarks.put_on_white(white, remarks.Labels(len(every), names, "Reference"))
        return cls({picture: [read[path][0] for path in of_one] for picture, of_one in files.items()}, remark)


def _sub_folder(path: Path, *roots: Path) -> str:
    return "" if path.parent in roots else path.parent.name.casefold()


def _reference(path: Path, root: Path) -> tuple[Tensor, bool]:
    """Return a reference, and whether it had transparent parts."""
    name = f"the reference {_shown(path, root)}"
    _require_inside(path, name)
    return read_picture(path, name)


def _on_unread(root: Path, other: Path | None = None) -> str | None:
    """Return a sentence on pictures in formats that are not read, or None."""
    return remarks.on_unread([_shown(path, root) for path in _files_besides(root, OTHER_SUFFIXES, other)])


def _nothing_found(folder: str, root: Path, frames: int) -> str:
    if frames == 1:
        advice = " It has videos: set `frames` to more than 1 to read them as clips."
        return (
            f"There are no pictures in the folder {folder!r}: none of its files ends with {', '.join(SUFFIXES)}."
            f"{advice if _files(root, film_files.SUFFIXES) else ''}{_after_a_space(_on_unread(root))}"
        )
    advice = " It has pictures: set `frames` to 1 to read them."
    return (
        f"There are no videos in the folder {folder!r}: none of its files ends with {', '.join(film_files.SUFFIXES)}."
        f"{advice if _files(root, SUFFIXES) else ''}"
    )


def _after_a_space(sentence: str | None) -> str:
    return f" {sentence}" if sentence else ""


def folder_identity(folder: str) -> str:
    """Return a key that changes when a picture, video or caption is added, removed or written, or the error on reading."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in _files(input_folder(folder), (*SUFFIXES, *film_files.SUFFIXES)):
            for file in [path, *_captions_of(path)]:
                stamp = file.stat()
                digest.update(f"{file} {stamp.st_size} {stamp.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    except (InvalidInputError, OSError) as error:  # the node reports it when it runs
        return str(error)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Picture:
    """A picture or film with its caption; ``name`` is readable."""

    path: Path
    name: str
    image: Tensor
    caption: CaptionText
    transparent: bool

    @classmethod
    def read(cls, path: Path, root: Path, pictures: int | None) -> _Picture:
        """Read a picture, or the first ``pictures`` of a film."""
        name = _shown(path, root)
        _require_inside(path, name)
        image, transparent = read_picture(path, name) if pictures is None else (read_film(path, name, pictures), False)
        return cls(path, name, image, _caption(path, root), transparent)


def _remarks(loaded: list[_Picture]) -> list[str]:
    """Return remarks. Having no captions at all is not odd, because one text may be meant for all pictures."""
    labels = remarks.Labels(len(loaded), [picture.name for picture in loaded])
    texts = [picture.caption.text for picture in loaded]
    blank = {index: colour for index, picture in enumerate(loaded) if (colour := only_colour(picture.image[0]))}
    said = [
        remarks.on_blank(blank, labels),
        remarks.put_on_white([index for index, picture in enumerate(loaded) if picture.transparent], labels),
        remarks.on_empty_captions(texts, labels) if any(texts) else None,
        remarks.on_guessed_texts([index for index, picture in enumerate(loaded) if picture.caption.guessed], labels),
    ]
    return [sentence for sentence in said if sentence]


def input_folder(folder: str) -> Path:
    """Return the folder of that name inside the input folder; never the input folder itself or one outside it.

    Raises:
        InvalidInputError: If there is none.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    try:
        found = (root / folder).resolve()
        if found != root and found.is_relative_to(root) and found.is_dir():
            return found
    except (OSError, ValueError):  # a name that file systems refuse
        pass
    raise InvalidInputError(
        f"There is no folder {folder!r} in ComfyUI's input folder. Put your pictures into one there, press R, and "
        "choose it."
    )


def _files(root: Path, suffixes: Sequence[str]) -> dict[Path, int]:
    """Return every file with one of these suffixes in the folder and its direct sub-folders, and how often it counts."""
    found = dict.fromkeys(_of_suffix(root, suffixes), 1)
    for inner in sorted((path for path in _listed(root) if path.is_dir()), key=_order):
        named = REPEATED.match(inner.name)
        times = int(named[1]) if named else 1
        if times > MOST_REPEATS:
            raise InvalidInputError(
                f"The folder {inner.name!r} asks for its pictures {times} times, but at most {MOST_REPEATS} are "
                "possible."
            )
        found |= {path: times for path in _of_suffix(inner, suffixes) if times}
    return found


def _files_besides(root: Path, suffixes: Sequence[str], other: Path | None) -> dict[Path, int]:
    """Return the same without the files of another folder, which may be a sub-folder: pictures and references are two sets."""
    found = _files(root, suffixes)
    if other is None or not other.is_relative_to(root):
        return found
    return {path: times for path, times in found.items() if not path.is_relative_to(other)}


def _of_suffix(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    files = [path for path in _listed(folder) if path.suffix.lower() in suffixes and path.is_file()]
    return sorted((path for path in files if not path.name.startswith(".")), key=_order)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InvalidInputError(f"The folder {folder.name!r} cannot be read: {error.strerror}.") from error


def _order(path: Path) -> list[tuple[int, str]]:
    """Return the key for sorting names naturally: 2.png comes before 10.png."""
    parts = re.split(r"(\d{1,18})", path.name.casefold())
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts] + [(0, path.name)]


def _captions_of(picture: Path) -> list[Path]:
    """Return the files that may contain a picture's caption, of which the first counts; for example .txt, .TXT or .Txt."""
    endings = [ending for suffix in CAPTION_SUFFIXES for ending in (suffix, suffix.upper(), suffix.title())]
    candidates = [picture.with_suffix(ending) for ending in endings]
    return [path for path in candidates if path.is_file()]


def _caption(picture: Path, root: Path) -> CaptionText:
    files = _captions_of(picture)
    if not files:
        return CaptionText("", guessed=False)
    name = _shown(files[0], root)
    _require_inside(files[0], name)
    try:
        with files[0].open("rb") as file:
            content = file.read(LARGEST_CAPTION + 1)
    except OSError as error:
        raise InvalidInputError(f"{name} cannot be read: {error.strerror}.") from error
    if len(content) > LARGEST_CAPTION:
        raise InvalidInputError(
            f"{name} is larger than {LARGEST_CAPTION // 1024} KiB, too long for a caption. Shorten it."
        )
    try:
        return caption_text(content)
    except InvalidInputError as error:
        raise InvalidInputError(f"{name} {error}") from error


def _shown(path: Path, root: Path) -> str:
    """Return a file's name in a form for messages and pages: no line breaks, and only printable characters."""
    return "".join(char if char.isprintable() else "?" for char in path.relative_to(root).as_posix())


def _require_inside(path: Path, name: str) -> None:
    """Refuse a link that leads out of the input folder."""
    if not path.resolve().is_relative_to(Path(folder_paths.get_input_directory()).resolve()):
        raise InvalidInputError(
            f"{name} is a link out of ComfyUI's input folder. Copy the file itself into the folder."
        )


def _announced(paths: list[Path], progress: Callable[[int, int], None]) -> Iterator[Path]:
    for number, path in enumerate(paths, 1):
        yield path
        progress(number, len(paths))
