"""A disk that is full at any moment costs one file, is reported in one sentence, and never costs the run.

There are two kinds of full disks: a real small file system (a tmpfs of a few MiB, mounted privately, which needs the
permission to create a mount namespace), and the system's limit on the size of a file. The latter works on every POSIX
system, so the cases still run where the former is not allowed.
"""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from . import tiny_graph

KINDS = ("file system", "file size limit")
MIB = 2**20
SIZE = 6 * MIB
ROOM = 6000  # bytes left: enough for a part of every file, but not for a whole one
TRAINED = {"loras/toy_00001_.safetensors", "loras/toy_00001_.html"}
FREE = "Free some disk space and try again."


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """The kind of full disk."""
    return request.param


@pytest.fixture(scope="module")
def server(kind, fork_server):
    """The fork server, if this kind of disk is available."""
    if kind == "file system" and not fork_server.may_mount:
        pytest.skip("no small file system can be mounted here; the same cases run with a file size limit")
    return fork_server


@pytest.fixture
def disk(kind, server, tmp_path):
    """A folder on a disk that can fill up: run a graph there and inspect it."""
    return Disk(kind, server, tmp_path / "run")


class Disk:
    """Runs the graph with a disk that is full when a certain file is written."""

    def __init__(self, kind, server, base):
        self.base, self._kind, self._server = base, kind, server
        (base / "disk").mkdir(parents=True)
        if kind == "file system":
            assert server.ask("mount", path=str(base / "disk"), size=SIZE)

    def run(self, full_at=None, *, once=True, room=ROOM, **graph):
        fault = full_at and {
            "kind": "fill", "when": {"pattern": full_at, "room": room, "how": self._kind, "once": once},
        }  # fmt: skip
        return self._server.run(self.base, graph, {**(fault or {}), "no reserve": True})

    def files(self):
        """Path below the output folder -> digest; checks that no file is incomplete."""
        seen = self._server.ask("look", base=str(self.base / "disk" / "output"))
        assert seen["damaged"] == []
        assert seen["leftovers"] == []
        return seen["digests"]

    def output(self):
        """The trainer's LoRA output."""
        return torch.load(self.base / "output.pt", weights_only=True)


@pytest.fixture(scope="module")
def expected(fork_server, tmp_path_factory):
    """The trainer's output in a run with enough space."""
    base = tmp_path_factory.mktemp("expected")
    whole = fork_server.run(base)
    assert whole.error is None, whole.sentence
    return torch.load(base / "output.pt", weights_only=True)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_one_sentence_of_ours(outcome, pattern):
    assert outcome.error is not None
    assert "BlockSkipError" in outcome.error, outcome.error
    assert_sentence(outcome.sentence, pattern)


def assert_sentence(text, pattern):
    assert re.search(pattern, text), text
    assert len(text) < 400
    assert text.endswith(".")
    assert "\n" not in text


def names(files, ending=""):
    return {name for name in files if name.endswith(ending)}


@pytest.mark.parametrize("file", ["shard-00000*", "shard-00001*", "unfinished.json", "manifest.json"])
def test_full_while_residuals_are_precomputed(disk, expected, file):
    """The node ends; complete files are kept, and queueing again continues from there."""
    room = 0 if "json" in file else ROOM
    outcome = disk.run(file, room=room)
    assert_one_sentence_of_ours(outcome, rf"^{file.replace('*', '.*')} could not be written: .*{FREE}$")
    left = disk.files()
    assert not names(left, "manifest.json")
    assert not any(name.startswith("loras") for name in left)
    again = disk.run()
    assert again.error is None
    now = disk.files()
    whole = {name: digest for name, digest in left.items() if "shard" in name} if "unfinished" not in file else {}
    assert whole.items() <= now.items()
    assert_same(disk.output(), expected)


def test_full_while_chunks_are_computed(disk, expected):
    """In the middle of training: the LoRA so far is saved, nothing of the chunk is kept, and the run can be resumed."""
    outcome = disk.run("shard-00000*", storage="chunked")
    assert_one_sentence_of_ours(outcome, f"could not be written: .*{FREE}$")
    assert not any("residuals" in name for name in disk.files())
    assert disk.run(storage="chunked").error is None
    assert_same(disk.output(), expected)


@pytest.mark.parametrize("file", ["state-00000001*", "state-00000003*", "state-00000005*"])
def test_full_while_a_training_state_is_written(disk, expected, file):
    """The run continues without it and says so; the next state is written again."""
    outcome = disk.run(file)
    assert outcome.error is None, outcome.sentence
    (problem,) = outcome.ui["problems"]
    assert_sentence(problem, rf"^{file.replace('*', '.*')} could not be written: .*{FREE}$")
    assert_same(disk.output(), expected)
    files = disk.files()
    assert names(files) >= {name for name in TRAINED if "blockskip" not in name}
    assert len([name for name in files if "state-" in name]) == 2
    assert disk.run().ui["resumed_at"] == (4 if "5" in file else 5)
    assert_same(disk.output(), expected)


def test_full_while_a_safe_point_is_written(disk, expected):
    outcome = disk.run("*step000002*")
    assert outcome.error is None, outcome.sentence
    (problem,) = outcome.ui["problems"]
    assert_sentence(problem, rf"^toy_00001_step000002\.safetensors could not be written: .*{FREE}$")
    assert {name for name in disk.files() if "step" in name} == {
        "loras/toy_00001_step000003.safetensors",
        "loras/toy_00001_step000004.safetensors",
    }
    assert_same(disk.output(), expected)


def test_full_while_the_lora_is_written(disk, expected):
    """It is on the node's output and in the training state: queueing again writes it."""
    outcome = disk.run("toy_00001_.safetensors")
    assert outcome.error is None, outcome.sentence
    (problem,) = outcome.ui["problems"]
    assert_sentence(problem, rf"^toy_00001_\.safetensors could not be written: .*{FREE} The LoRA is on the output")
    assert outcome.ui["file"] is None
    assert_same(disk.output(), expected)
    assert not names(disk.files(), "toy_00001_.safetensors")
    again = disk.run()
    assert (again.ui["resumed_at"], again.ui["problems"]) == (5, [])
    assert names(disk.files(), "_.safetensors")
    assert_same(disk.output(), expected)


def test_full_while_the_summary_is_written(disk, expected):
    outcome = disk.run("*.html")
    assert outcome.error is None, outcome.sentence
    (problem,) = outcome.ui["problems"]
    assert_sentence(problem, rf"^toy_00001_\.html could not be written: .*{FREE}$")
    assert outcome.ui["file"] == "toy_00001_.safetensors"
    assert outcome.ui["summary_file"] is None
    assert names(disk.files(), "toy_00001_.safetensors")
    assert not names(disk.files(), ".html")
    assert_same(disk.output(), expected)


def test_full_from_the_middle_to_the_end(disk, expected):
    """No state, checkpoint or file can be written: the LoRA is still on the output, and the last state is complete."""
    outcome = disk.run("state-00000003*", once=False)
    assert outcome.error is None, outcome.sentence
    assert outcome.ui["problems"]
    for problem in outcome.ui["problems"]:
        assert_sentence(problem, rf"could not be written: .*{FREE}")
    assert outcome.ui["file"] is None
    assert_same(disk.output(), expected)
    assert {name for name in disk.files() if "state-00000002" in name}


def test_earlier_files_stay_as_they_are(disk):
    disk.run(steps=2, output_name="loras/earlier")
    before = {name: digest for name, digest in disk.files().items() if "earlier" in name}
    assert len(before) >= 2
    disk.run("state-00000001*", once=False, output_name="loras/earlier", seed=8)
    assert before.items() <= disk.files().items()


def test_too_little_room_is_said_before_pictures_are_encoded(disk, kind):
    """The disk's last 256 MiB are left for others; this disk never had that much."""
    if kind != "file system":
        pytest.skip("a limit on the size of files leaves the disk as large as it is")
    outcome = disk._server.run(disk.base)
    assert_one_sentence_of_ours(
        outcome, "^The residuals would take .* on disk, but .* are free. Use fewer training examples"
    )
    assert disk.files() == {}


def test_the_tests_know_a_damaged_file(tmp_path):
    """Checks the assumptions of the tests in this folder."""
    good = tmp_path / "a.safetensors"
    from safetensors.torch import save_file

    save_file({"a": torch.ones(9)}, good)
    assert tiny_graph.damaged(tmp_path) == []
    good.write_bytes(good.read_bytes()[:-1])
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.html").write_text("<html>")
    (tmp_path / "d.html.part").write_text("<html>")
    assert tiny_graph.damaged(tmp_path) == ["a.safetensors", "b.json", "c.html"]
    assert tiny_graph.leftovers(tmp_path) == ["d.html.part"]
    with pytest.raises(Exception, match="incomplete|not fully covered|IncompleteBuffer"):
        load_file(good)
