"""A headless ComfyUI with this pack for tests and the demo: isolated, on a free port, always ended."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACK = "dit-blockskip"  # the folder name that a registry install gives the pack
DEMO_PACK = "blockskip_demo_nodes"
DEMO_MODELS = {
    "diffusion_models": "blockskip_world_dit.safetensors",
    "vae": "blockskip_world_vae.safetensors",
    "text_encoders": "blockskip_world_text.safetensors",
}
NOT_COPIED = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "demo_output")

ENDING_SIGNALS = [signal.SIGTERM] if os.name == "nt" else [signal.SIGTERM, signal.SIGHUP]

log = logging.getLogger(__name__)


class ServerProblem(RuntimeError):
    """The server did not start, or has ended; the message says why."""


class ComfyServer:
    """A ComfyUI process for a ``with`` block.

    Its only custom nodes are the pack in this repository and the `packs` (folder name -> source). Models
    (``models`` sub-folder -> files) and inputs (folders or files) are placed in its base directory, a temporary
    one unless `base` is given; the log is written there too, unless `log_file` is given. The process group is
    ended when the block is left, also by an exception, Ctrl-C or a SIGTERM.
    """

    def __init__(
        self,
        host: Path | str,
        *,
        python: Path | str = sys.executable,
        packs: Mapping[str, Path] | None = None,
        models: Mapping[str, Iterable[Path]] | None = None,
        inputs: Iterable[Path] = (),
        base: Path | None = None,
        log_file: Path | None = None,
        arguments: Iterable[str] = (),
        cpu: bool | None = None,
        timeout: float = 240.0,
    ) -> None:
        self.host = Path(host)
        self.python = str(python)
        self.packs = {PACK: ROOT, **({} if packs is None else packs)}
        self.models = models or {}
        self.inputs = tuple(inputs)
        self.arguments = tuple(arguments)
        self.cpu = cpu
        self.timeout = timeout
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.log_file = log_file
        self._given_base = base
        self._handlers: dict[int, Any] = {}

    @property
    def url(self) -> str:
        """The address of the server, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything the server has written so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def __enter__(self) -> ComfyServer:
        self._catch_signals()
        self.base = Path(self._given_base or tempfile.mkdtemp(prefix="blockskip-comfyui-")).resolve()
        self.log_file = self.log_file or self.base / "server.log"
        try:
            self._furnish()
            self._start()
            self._wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server's whole process group and remove the temporary base directory."""
        if self.process is not None:
            _end_group(self.process)
        if self._given_base is None:
            shutil.rmtree(self.base, ignore_errors=True)
        self._restore_signals()

    def wait(self) -> None:
        """Block until the server ends by itself."""
        if self.process is not None:
            self.process.wait()

    def _furnish(self) -> None:
        """Lay out the base directory: packs, models, inputs."""
        for name, source in self.packs.items():
            _place(Path(source), self.base / "custom_nodes" / name)
        for folder, files in self.models.items():
            for file in files:
                _place(Path(file), self.base / "models" / folder / Path(file).name)
        for source in self.inputs:
            _copy(Path(source), self.base / "input" / Path(source).name)

    def _start(self) -> None:
        cpu = self.cpu if self.cpu is not None else not _has_accelerator(self.python)
        command = [self.python, "main.py", *(["--cpu"] if cpu else []), "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs]
        command += self.arguments
        log.debug("%s", " ".join(command))
        with self.log_file.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=self.host,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                start_new_session=True,  # its own process group; no effect on Windows
            )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.timeout
        while not self._answers():
            if self.process.poll() is not None:
                raise self._problem(f"ComfyUI ended with status {self.process.returncode}")
            if time.monotonic() > deadline:
                raise self._problem(f"ComfyUI did not answer within {self.timeout:.0f} s")
            time.sleep(0.2)
        if "(IMPORT FAILED)" in self.log:
            raise self._problem("A custom node pack failed to import")

    def _problem(self, what: str) -> ServerProblem:
        return ServerProblem(f"{what}:\n{self.log_tail(60)}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self.log.splitlines()[-lines:])

    def _catch_signals(self) -> None:
        """Make the signals that would end this process unwind its stack instead, as Ctrl-C does."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, signal.default_int_handler) for number in ENDING_SIGNALS}

    def _restore_signals(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def demo_pack() -> dict[str, Path]:
    """The pack of the demo world, in the form that `ComfyServer` takes; empty if it does not exist."""
    folder = ROOT / "demo" / DEMO_PACK
    return {DEMO_PACK: folder} if (folder / "__init__.py").is_file() else {}


def demo_models() -> dict[str, list[Path]]:
    """The weights of the demo world, in the form that `ComfyServer` takes."""
    return {folder: [ROOT / "demo" / "assets" / name] for folder, name in DEMO_MODELS.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def _has_accelerator(python: str) -> bool:
    """Whether torch sees a GPU (of any kind) in that interpreter."""
    question = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([python, "-c", question], stderr=subprocess.DEVNULL).returncode == 0


def _place(source: Path, target: Path) -> None:
    """Link `target` to `source`, or copy where links are not allowed."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=NOT_COPIED)
    else:
        shutil.copy2(source, target)


def _end_group(process: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """Ask the process group to end, and kill it if it does not."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
        process.wait()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            log.warning("ComfyUI ignored signal %s", number)
    process.wait()
