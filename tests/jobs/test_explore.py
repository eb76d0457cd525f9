"""explore: a page for each prompt, from the miniature's weights."""

import pytest
from etils import epath
from parity import miniature

from sd3_jax import main

SIZES = ("image.height=64", "image.width=64", "sample.steps=3", "sample.max_length=20")


def explore(workdir, *flags):
    words = ["explore", "--config=released:tiny", f"--workdir={workdir}"]
    weights = f"weights={miniature.folder('sd35_medium')}"
    return main.main([*words, *(f"--config.{x}" for x in (weights, *SIZES, *flags))])


def test_a_page_shows_the_latents_the_words_and_the_blocks(tmp_path):
    flags = "sample.prompt=a red fox", "explore.words=fox,red", "explore.moments=2"
    assert explore(tmp_path, *flags) == 0
    (page,) = epath.Path(tmp_path / "explore").iterdir()
    assert page.name == "0000-a-red-fox.html"
    text = page.read_text()
    assert text.count("<img") == 1 + 4 + 2 + 2 * 2  # picture, latents, estimates, words
    assert "<h3>fox</h3>" in text and "<h3>a</h3>" not in text
    assert text.count("Plot: ") == 4


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["explore.words=cat"], '"cat" is not a word of the prompt'),
        (["explore.moments=0"], "config.explore.moments = 0"),
        (["sample.per_prompt=65"], "65 pictures; explore makes at most 64 pages"),
    ],
)
def test_mistakes(tmp_path, flags, complaint, capsys):
    assert explore(tmp_path, "sample.prompt=a red fox", *flags) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "explore").exists()


def test_a_run_has_to_be_exported_first(tmp_path, capsys):
    flags = f"--workdir={tmp_path}", "--config.sample.prompt=a red fox"
    assert main.main(["explore", "--config=released:tiny", *flags]) == 2
    assert "config.weights is empty; explore reads" in capsys.readouterr().err
