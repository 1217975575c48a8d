"""Compiles ``guard.cpp`` once per torch version and loads it: the part that autograd's engine needs below Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
from pathlib import Path

import torch

from .. import environment

SOURCE = Path(__file__).with_name("guard.cpp")
LIBRARY = "guard.so"


class CardUnavailable(RuntimeError):
    """No card can be emulated here; the message gives the reason in one sentence."""


@functools.cache
def reason_against() -> str | None:
    """Return why no card can be emulated in this process, or None if one can be."""
    if os.name == "nt":
        return "An emulated card needs g++ and Linux; this is Windows."
    if torch.version.cuda is None:
        return f"An emulated card needs a CUDA build of torch; this is {torch.__version__}."
    if torch.cuda.is_available():
        return f"This machine has a real card ({torch.cuda.get_device_name(0)}), which an emulated one would hide."
    if shutil.which("g++") is None and not _library_folder().joinpath(environment.FINISHED).exists():
        return "An emulated card needs g++ to compile devtools/card/guard.cpp; g++ is not installed."
    return None


def install() -> ctypes.CDLL:
    """Make the card known to torch's engine.

    Returns:
        The library, which must stay loaded.

    Raises:
        CardUnavailable: If no card can be emulated here.
    """
    reason = reason_against()
    if reason is not None:
        raise CardUnavailable(reason)
    library = ctypes.CDLL(str(_built_library()), mode=ctypes.RTLD_GLOBAL)
    library.install_card_guard()
    library.card_guard_is_installed.restype = ctypes.c_bool
    if not library.card_guard_is_installed():
        raise CardUnavailable(f"torch {torch.__version__} does not call the emulated card's hooks.")
    return library


def _built_library() -> Path:
    """Compile the library unless this source has already been compiled for this torch version."""
    try:
        return environment.made_once(_library_folder(), _compile) / LIBRARY
    except environment.EnvironmentProblem as problem:
        raise CardUnavailable(str(problem)) from problem


def _library_folder() -> Path:
    parts = torch.__version__, str(torch._C._GLIBCXX_USE_CXX11_ABI), SOURCE.read_text("utf-8")
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return environment.cache_folder() / f"card-guard-{name}"


def _compile(folder: Path) -> None:
    parts = Path(torch.__file__).parent
    include = parts / "include"
    environment.run(
        [
            "g++", "-O1", "-fPIC", "-shared", "-std=c++17",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", SOURCE,
            "-o", folder / LIBRARY, f"-L{parts / 'lib'}", "-ltorch_cpu", "-lc10",
        ],
        "Compiling devtools/card/guard.cpp",
    )  # fmt: skip
