"""Plots of a card: files that show what the build measured, on their own and in light and dark."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from prefbuild.errors import StageError
from prefbuild.promote.plots import write_plots
from prefbuild.report import pictures
from prefbuild.report.pictures import COLOURS, Panel, figure
from tests import built

LIVE = "build/x/live/plots/metrics/train"
SVG = "{http://www.w3.org/2000/svg}"


def draw(root: Path, **metrics: Any) -> tuple[dict[str, str], Path]:
    """What was drawn, and the folder it lies in."""
    read = {stage: json.loads((root / f"build/x/{stage}.json").read_text()) for stage in ("prepare", "evaluate")}
    read["baseline"] = json.loads((root / built.BASELINE / "metrics.json").read_text())
    folder = root / "plots"
    folder.mkdir(exist_ok=True)
    return write_plots(root, folder, resolved=built.resolved(root), metrics={**read, **metrics}), folder


def texts(path: Path) -> list[str]:
    return [str(text.text) for text in ElementTree.parse(path).iter(f"{SVG}text")]


def test_every_plot_is_written_and_says_what_it_shows(root):
    shown, folder = draw(root)
    assert shown == {
        "training.svg": "Training by step: loss from 0.7188 to 0.5, reward margin from 0.25 to 2, reward accuracy from "
        "0 to 0.875, rewards from 0.125 / −0.125 to 1 / −1",
        "measured.svg": "concise corpus: base 0.5, this model 0.5; concise exact_match: base 0.45, this model 0.75; "
        + shown["measured.svg"].partition("0.75; ")[2],
        "lengths.svg": "Rows by length in tokens: prompt all under 16, chosen all under 8, rejected all under 8",
    }
    assert sorted(path.name for path in folder.iterdir()) == sorted(shown)
    for name, says in shown.items():
        svg = ElementTree.parse(folder / name).getroot()
        assert svg.tag == f"{SVG}svg"
        assert svg.get("aria-label") == says


def test_the_same_numbers_give_the_same_bytes(root):
    first = {name: (draw(root)[1] / name).read_bytes() for name in draw(root)[0]}
    assert first == {name: (draw(root)[1] / name).read_bytes() for name in first}


def test_curves_and_legends_are_in_the_picture(root):
    _, folder = draw(root)
    found = texts(folder / "training.svg")
    for text in ("Loss", "Reward margin", "Reward accuracy", "Rewards", "chosen", "rejected", "step"):
        assert text in found
    assert len(list(ElementTree.parse(folder / "training.svg").iter(f"{SVG}polyline"))) == 5
    assert {"base 0.450 ± 0.050", "this model 0.750 ± 0.050"} <= set(texts(folder / "measured.svg"))
    assert {"prompt", "chosen", "rejected", "tokens"} <= set(texts(folder / "lengths.svg"))


def test_a_plot_needs_no_page_around_it(root):
    shown, folder = draw(root)
    for name in shown:
        text = (folder / name).read_text()
        # No class is left without a page's styles, and nothing is loaded.
        assert "class=" not in text and "href" not in text and "url(" not in text
        drawn = set(re.findall(r'(?:fill|stroke)="(#\w+)"', text))
        assert {"#ffffff", "#5c6670"} <= drawn <= COLOURS.keys()
        # Each colour has one for the dark.
        dark = re.findall(r"(fill|stroke)=\"(#\w+)\"\]\{\1:(#\w+)\}", text)
        assert {(light, colour) for _, light, colour in dark} == set(COLOURS.items())
        assert "@media (prefers-color-scheme:dark){[" in text


def test_figures_have_the_colours_of_the_page():
    page = (Path(pictures.__file__).parent / "page.html.jinja").read_text()
    light, dark = (re.findall(r"--(card|ink|soft|line|c[123]): (#\w+);", block) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL))  # fmt: skip
    assert dict(zip(dict(light).values(), dict(dark).values(), strict=True)) == COLOURS


def test_without_curves_lengths_and_a_baseline_there_are_no_plots(root):
    shutil.rmtree(root / LIVE)
    (root / "build/x/lengths.csv").unlink()
    shown, folder = draw(root, baseline={})
    assert shown == {}
    assert not list(folder.iterdir())


def test_a_method_without_rewards_has_a_loss(root):
    shutil.rmtree(root / LIVE / "rewards")
    shown, folder = draw(root)
    assert shown["training.svg"] == "Training by step: loss from 0.7188 to 0.5"
    assert "Rewards" not in texts(folder / "training.svg")


def test_points_that_are_no_numbers_are_left_out_and_counted(root):
    built.write(root / LIVE / "loss.tsv", "step\tloss\n1\tnan\n2\t0.5\n3\tinf\n")
    _, folder = draw(root)
    assert "Loss (2 points are no finite numbers)" in texts(folder / "training.svg")


@pytest.mark.parametrize("value", [float("nan"), None, True, "0.5"])
def test_a_metric_that_is_no_number_has_no_picture(root, value):
    metrics = {"concise": {"exact_match": value, "corpus": 0.5, "n": 40}}
    shown, _ = draw(root, evaluate=metrics)
    assert shown["measured.svg"] == "concise corpus: base 0.5, this model 0.5"


def test_metrics_beyond_0_to_1_have_an_axis_of_their_own(root):
    _, folder = draw(root, evaluate={"concise": {"length": 37.5, "n": 40}})
    assert {"0", "40"} <= set(texts(folder / "measured.svg"))


def test_a_file_of_the_build_that_is_broken_is_named(root):
    built.write(root / LIVE / "loss.tsv", "step\tloss\n1\tx\n")
    with pytest.raises(StageError, match=r"loss\.tsv:2: has no numbers for step and loss"):
        draw(root)


def test_texts_can_not_break_a_picture():
    heading = "a<b> & \"c\" \x00\x1b'd'"
    svg = figure(
        heading, [Panel(heading=heading, svg=pictures.line_chart(heading, {"l": [(1.0, 2.0)]}, "<x>"), legend=[])]
    )
    assert next(text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")) == "a<b> & \"c\" 'd'"


def test_a_long_heading_is_cut(root):
    panel = Panel(heading="m" * 80, svg=pictures.line_chart("t", {"l": [(1.0, 2.0)]}, "x"), legend=[])
    assert f">{'m' * 45}…<" in figure("t", [panel])
