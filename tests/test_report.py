"""`mim report`: one page from a run directory, whole, damaged or going on."""

import json
import math
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mim.commands.report import report
from mim.config import ConfigError
from mim.report import curves, facts, panels, pictures, ticks
from mim.report.charts import Chart, Table
from mim.report.page import page
from mim.report.runs import read
from tests.written_run import write_run

LOADS = ("src", "href", "srcset", "data", "action", "poster")  # attributes by which a page asks for something


class Elements(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A written run of 10,000 steps with 500 log lines."""
    return write_run(tmp_path_factory.mktemp("written") / "mae", log_every=20, picture_every=2500)


def test_a_page_asks_for_nothing_beyond_itself(run):
    elements = Elements(page([run])).found
    asked = [attributes[name] for _, attributes in elements for name in LOADS if attributes.get(name)]
    assert len(asked) > 5
    assert all(value.startswith(("data:", "#")) for value in asked)
    assert "url(" not in page([run])


def test_the_page_has_every_section_and_its_numbers(run):
    text = page([run])
    for key in ("learning", "probes", "health", "optimizer", "machine", "pictures", "events", "recipe"):
        assert f'<section id="{key}">' in text
    for words in ("step 400", "step 420", "truncated JPEG", "step-00000200", "vit_tiny_patch16_224", "rankme"):
        assert words in text
    assert text.count('<svg viewBox="0 0 440 240"') == text.count('<details class="values"><summary>values')


def test_variants_of_one_number_share_a_chart_and_different_numbers_do_not(tmp_path):
    run = write_run(tmp_path / "mae", steps=20)
    keys = ("attention_entropy", "attention_entropy_min", "dead_neurons", *(f"knn_k{k}" for k in range(1, 9)))
    with (run / "log.jsonl").open("a") as log:
        for step in (21, 22):
            values = dict.fromkeys(keys, step / 100)
            log.write(json.dumps({"event": "eval", "eval": "health", "step": step, **values}) + "\n")
    (section,) = [one for one in panels.sections([read(run)], []) if one.key == "health"]
    charts = [[curve.name for curve in chart.curves] for chart in section.charts]
    assert charts[:2] == [["attention entropy", "attention entropy min"], ["dead neurons"]]
    assert sorted(name for names in charts[2:] for name in names) == [f"knn k{k}" for k in range(1, 9)]


def test_skipped_steps_in_a_row_are_one_event(tmp_path):
    run = write_run(tmp_path / "mae", steps=20)
    with (run / "log.jsonl").open("a") as log:
        log.writelines(json.dumps({"event": "skipped", "step": step}) + "\n" for step in (21, 22, 23, 25))
    told = [event.text for event in facts.events([read(run)])[0] if event.kind == "skipped"]
    assert [text.partition(":")[0] for text in told] == ["step 25", "steps 21 to 23"]


def test_ticks_that_lie_close_have_different_names():
    chart = Chart("", "", [curves.of(0, "distance", [(0, 16.5601), (1, 16.5609)])])
    names = [name for _, name in chart.drawn.value_ticks]
    assert len(set(names)) == len(names) > 2


def test_a_log_of_10000_lines_makes_a_page_below_3_mb(tmp_path):
    text = page([write_run(tmp_path / "long", log_every=1, picture_every=1000)])
    assert len(text.encode()) < 3_000_000
    assert "smallest and largest of each column of 10,000 values" in text


def test_text_of_files_stays_text(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>\"'"
    run = write_run(tmp_path / "evil", steps=60)
    (run / "config.yaml").write_text(json.dumps({"data": {"path": evil}, "objective": {"name": evil}}))
    lines = [
        {"event": evil, "step": 3, evil: evil},
        {"event": "train", "step": 5, "loss": 1.0, evil: 2.0},
        {"event": "eval", "step": 5, "eval": evil, evil: 0.5},
        {"event": "eval", "step": 6, "eval": evil, evil: 0.6},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "status.json").write_text(json.dumps({"state": evil, "reason": evil, "step": 1, "of": 2}))
    found = Elements(page([run])).found
    assert not [tag for tag, attributes in found if attributes.get("src") == "x" or "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in found) == 1


@pytest.mark.parametrize("damage", ["torn", "foreign", "binary", "empty", "no log", "no config", "only status"])
def test_what_cannot_be_read_is_said_and_the_rest_is_shown(tmp_path, damage):
    run = write_run(tmp_path / "mae", steps=100)
    log, settings = run / "log.jsonl", run / "config.yaml"
    if damage == "torn":
        log.write_bytes(log.read_bytes()[:-20])
    elif damage == "foreign":
        foreign = (
            '7\n[]\n{"step": "x", "event": "train"}\n{"step": 5, "event": ["a"]}\n{"step": 1e400, "event": "train"}\n'
        )
        log.write_text(foreign + '{"step": 8, "event": "train", "loss": "low", "lr": null, "grad_norm": NaN}\n')
    elif damage == "binary":
        for name in ("log.jsonl", "config.yaml", "status.json", "journal.jsonl"):
            (run / name).write_bytes(np.random.default_rng(0).bytes(3000))
    elif damage == "empty":
        for file in (log, settings):
            file.write_text("")
    else:
        for file in {"no log": [log], "no config": [settings], "only status": [log, settings]}[damage]:
            file.unlink()
    text = page([run])
    assert "</html>" in text
    said = read(run).unread
    assert bool(said) == (damage != "no log")
    assert all(words.split(":")[0] in text for words in said)


def test_values_that_are_not_finite_are_left_out_and_named():
    found = curves.of(0, "loss", [(1, 2.0), (2, math.nan), (3, math.inf), (4, "x"), (5, True), (6, 1.0)])
    assert found.values.tolist() == [2.0, 1.0]
    assert found.not_finite == (2, 3)
    assert Chart("loss", "", [found]).drawn.notes == ["loss: 2 not finite, the first at step 2"]


def test_thinning_keeps_the_extremes_of_every_column_and_both_ends():
    values = np.random.default_rng(0).normal(size=20_000)
    values[7] = 50.0
    curve = curves.of(0, "loss", enumerate(values))
    thin = curves.thinned(curve, columns=100)
    assert len(thin) <= 202
    for part in np.array_split(np.arange(20_000), 100)[1:-1]:
        inside = (thin.steps > part[0]) & (thin.steps < part[-1])
        assert thin.values[inside].max() >= np.delete(values[part], [0, -1]).max() - 1e-12 or len(part) < 3
    assert 50.0 in thin.values
    assert (thin.steps[0], thin.steps[-1]) == (0, 19_999)


def test_skill_is_measured_against_what_learns_nothing(run, tmp_path):
    found = {curve.name: curve for curve in panels.skills([read(run)])}
    logged = [line["loss"] for line in read(run).events("train")]
    assert found["training"].values == pytest.approx([1 - loss / (47 / 48) for loss in logged])
    assert len(found["held out"]) == 4
    beit = read(run)
    beit.sections = {"objective": {"name": "beit", "num_codes": 512}}
    assert curves.trivial_loss(beit) == ("uniform guess", math.log(512))
    beit.sections = {"objective": {"name": "tokenize"}}
    assert curves.trivial_loss(beit) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.42), (-1.5, -0.3), (1e-7, 3e-7), (0, 1.3e6), (5, 5)])
def test_ticks_are_round_and_few(low, high):
    found = ticks.linear(low, high)
    assert 1 <= len(found) <= 5
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert all(len(f"{abs(tick):.10e}".partition("e")[0].rstrip("0")) <= 5 for tick in found)


@pytest.mark.parametrize(("low", "high"), [(0.02, 3), (1e-6, 1e5), (3, 70)])
def test_ticks_of_a_log_scale_are_round_and_few(low, high):
    found = ticks.logarithmic(low, high)
    assert 2 <= len(found) <= 5
    assert all(low <= tick <= high and f"{tick:e}"[0] in "1235" for tick in found)


def test_labels_of_curves_that_end_together_do_not_lie_on_each_other():
    same = [curves.of(0, f"curve {k}", [(0, 1.0), (9, 1 + k / 1000)]) for k in range(5)]
    places = sorted(line.label_y for line in Chart("loss", "", same).drawn.lines)
    assert min(b - a for a, b in pairwise(places)) >= 14.9
    assert places[0] > 0
    assert places[-1] < 240


def test_a_table_holds_the_values_that_were_logged():
    curve = curves.of(0, "loss", [(step, step / 7) for step in range(1000)])
    table = Table.of(Chart("loss", "", [curve]))
    assert table.rows[0][1] == ["0"]
    assert table.rows[-1] == ("999", ["142.7"])
    assert len(table.rows) + table.left_out == 1000


def test_runs_beside_each_other_show_in_what_their_recipes_differ(run, tmp_path):
    other = write_run(tmp_path / "other", steps=2000, log_every=50, rate=3e-3)
    assert facts.differences([read(run), read(other)]) == [("optim.lr", ["0.001", "0.003"])]
    text = page([run, other])
    assert "optim.lr" in text
    drawn = Chart("loss", "", curves.logged([read(run), read(other)], "train", "loss", "training"), "AB").drawn
    assert [(line.label, line.colour) for line in drawn.lines] == [("A", 1), ("B", 2)]


def test_pictures_beyond_the_budget_are_left_out_and_the_newest_stays(run, monkeypatch):
    whole = {strip.name: strip for strip in pictures.strips([read(run)])}
    assert [picture.step for picture in whole["attention"].pictures] == [10_000, 2500, 5000, 7500]
    newest = sum(len(strip.pictures[0].uri) for strip in whole.values())
    monkeypatch.setattr(pictures, "BUDGET", newest + 100)
    assert [[p.step for p in strip.pictures] for strip in pictures.strips([read(run)])] == [[10_000], [10_000]]
    assert "1 of 4 pictures are shown" in page([run])


def test_a_picture_that_is_none_is_said(tmp_path):
    run = write_run(tmp_path / "mae", steps=100)
    (run / "pictures/attention-00000100.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(run / "pictures/attention-00000050.png")
    text = page([run])
    assert "attention-00000100.png cannot be read" in text
    assert "attention at step 50" in text


def test_the_command_writes_the_page_and_spares_what_is_no_report(run, tmp_path):
    out = tmp_path / "page.html"
    for _ in range(2):  # over a report of ours, too
        assert CliRunner().invoke(report, [str(run), "--out", str(out)], catch_exceptions=False).output == f"{out}\n"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no report"):
        CliRunner().invoke(report, [str(run), "--out", str(out)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="is not a run directory"):
        CliRunner().invoke(report, [str(tmp_path)], catch_exceptions=False)
