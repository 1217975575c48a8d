"""What a user downloads: the files that the pack needs and its help, and no development files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
NEEDED = [
    "__init__.py",
    "nodes/__init__.py",
    "nodes/train_lora.py",
    "nodes/run/training.py",
    "blockskip_core/__init__.py",
    "blockskip_core/hosts/families/flux.py",
    "requirements.txt",
    "pyproject.toml",
    "README.md",
    "MEASURED.md",
    "docs/troubleshooting.md",
    "LICENSE",
    "web/docs/BlockSkip_TrainLora.md",
    "web/docs/BlockSkip_TrainLora/zh.md",
    "locales/zh/nodeDefs.json",
]
FOR_DEVELOPERS = [
    "tests/",
    "demo/",
    "devtools/",
    "benchmarks/",
    "launch/",
    ".ci/",
    ".github/",
    "dev.py",
    "CONTRIBUTING.md",
]
# Words, not syntax: the registry's review also reads comments and strings. `tests/core` checks the syntax.
ALARMS = re.compile(
    r"os\.environ|getenv|subprocess|\beval\(|\bexec\(|pickle|urllib|\brequests\b|\bsocket\b|__import__|torch\.load"
)


def git(*arguments, stdin=None):
    if not (ROOT / ".git").exists():
        pytest.skip("what is shipped is known from git, and this is no git checkout")
    command = ["git", "-C", str(ROOT), "-c", f"core.excludesFile={ROOT / '.comfyignore'}", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False).stdout.splitlines()


def shipped_files():
    """The files in git (or about to be) that .comfyignore does not exclude; both use the same patterns."""
    files = git("ls-files", "--cached", "--others", f"--exclude-from={ROOT / '.gitignore'}")
    files = [name for name in files if (ROOT / name).is_file()]
    kept_back = set(git("check-ignore", "--no-index", "--stdin", stdin="\n".join(files)))
    return sorted(set(files) - kept_back)


@pytest.fixture(scope="module")
def shipped():
    """Their names."""
    return shipped_files()


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_everything_that_a_user_needs_is_shipped(shipped):
    assert [name for name in NEEDED if name not in shipped] == []
    folders = (
        ("workflows", "*"),
        ("web", "**/*"),
        ("locales", "**/*"),
        ("nodes", "**/*.py"),
        ("blockskip_core", "**/*.py"),
    )
    for folder, pattern in folders:
        there = {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern) if path.is_file()}
        assert there
        assert there <= set(shipped)


def test_nothing_of_ours_is_shipped(shipped):
    assert [name for name in shipped if name.startswith(tuple(FOR_DEVELOPERS))] == []


def test_the_download_is_small(shipped):
    assert sum((ROOT / name).stat().st_size for name in shipped) < 5 * 2**20


def test_no_pattern_reaches_below_the_top_by_accident():
    """An unanchored ``docs/`` would also exclude ``web/docs/``."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns
    assert all(pattern.startswith("/") for pattern in patterns)


def test_the_version_is_said_the_same_everywhere(core):
    version = pyproject()["project"]["version"]
    assert version == core("version").VERSION
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE).group(1) == version


def test_both_lists_of_requirements_are_the_same():
    assert requirements() == pyproject()["project"]["dependencies"]


def test_no_requirement_replaces_what_comfyui_brings():
    names = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in requirements()}
    brought = "torch torchvision torchaudio safetensors numpy pillow transformers einops scipy tqdm psutil"
    assert not names & set(brought.split())


def test_every_requirement_is_a_line_that_the_manager_can_install():
    assert [line for line in requirements() if not re.fullmatch(r"[A-Za-z0-9_.-]+(>=[0-9.]+)?", line)] == []


def test_the_readme_and_the_licence_of_the_metadata_exist():
    project = pyproject()["project"]
    assert (ROOT / project["readme"]).is_file()
    licence = (ROOT / project["license"]["file"]).read_text(encoding="utf-8")
    assert "GNU GENERAL PUBLIC LICENSE" in licence
    assert "Version 3, 29 June 2007" in licence


def test_the_icon_is_what_the_registry_takes(shipped):
    """Square, at most 400 px, PNG, at the address of the raw file."""
    address = pyproject()["tool"]["comfy"]["Icon"]
    owner_and_name = pyproject()["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    assert address == f"https://raw.githubusercontent.com/{owner_and_name}/main/icon.png"
    with Image.open(ROOT / "icon.png") as icon:
        assert icon.format == "PNG"
        assert icon.width == icon.height <= 400
    assert "icon.png" in shipped, "the README shows it"


def test_the_least_comfyui_is_said_in_three_parts():
    """comfy-cli drops any other form."""
    assert re.fullmatch(r">=\d+\.\d+\.\d+", pyproject()["tool"]["comfy"]["requires-comfyui"])


def test_shipped_code_holds_no_word_that_a_security_review_stops_at(shipped):
    code = [name for name in shipped if Path(name).suffix in (".py", ".js", ".mjs")]
    assert len(code) > 20
    found = {name: ALARMS.findall((ROOT / name).read_text(encoding="utf-8")) for name in code}
    assert {name: words for name, words in found.items() if words} == {}


def test_that_search_finds_what_it_looks_for():
    for text in ("os.environ['A']", "import subprocess", "eval(x)", "exec(x)", "import pickle", "torch.load(p)"):
        assert ALARMS.search(text)
    assert not ALARMS.search("model.evaluate(x); executor(x)")
