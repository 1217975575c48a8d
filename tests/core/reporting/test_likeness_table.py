"""The likeness of a run's samples: means by step, the best one in words, and the table."""

import pytest
from blockskip_pack.blockskip_core.reporting.likeness_table import (
    ScoredSample,
    likeness_by_step,
    likeness_in_words,
    write_likeness_table,
)

SAMPLES = [
    ScoredSample(0, 1, 0.5, "a.png"), ScoredSample(0, 2, 0.25, "b.png"),
    ScoredSample(100, 1, 0.75, "c.png"), ScoredSample(100, 2, 0.5, "d.png"),
    ScoredSample(200, 1, 0.5, "e.png"), ScoredSample(200, 2, None, "f.png"),
    ScoredSample(300, 1, 0.5, "g.png"), ScoredSample(300, 2, 0.625, "h.png"),
]  # fmt: skip


def test_a_step_is_known_if_all_its_samples_are():
    assert likeness_by_step(SAMPLES) == {0: 0.375, 100: 0.625, 300: 0.5625}


@pytest.mark.parametrize(
    ("by_step", "files", "words"),
    [
        ({}, {}, ""),
        ({0: 0.375, 100: 0.625, 300: 0.5625}, {100: "x_step000100.safetensors"},
         "most alike after step 100: 0.6250 (x_step000100.safetensors); after step 300: 0.5625"),
        ({100: 0.625, 300: 0.5}, {}, "most alike after step 100: 0.6250 (no checkpoint of that step is kept); after step 300: 0.5000"),
        ({0: 0.5, 1200: 0.5}, {}, "most alike after step 0: 0.5000 (before training); after step 1,200: 0.5000"),
        ({300: 0.5}, {300: "x.safetensors"}, "most alike after step 300: 0.5000 (x.safetensors)"),
    ],
)  # fmt: skip
def test_the_best_step_names_its_file(by_step, files, words):
    assert likeness_in_words(by_step, files) == words


def test_the_table_has_a_row_per_sample(tmp_path):
    write_likeness_table(SAMPLES[4:6], tmp_path / "likeness.csv")
    assert (tmp_path / "likeness.csv").read_text().splitlines() == [
        "step,prompt,likeness,picture", "200,1,0.5,e.png", "200,2,,f.png",
    ]  # fmt: skip
