"""The report stage: what it shows, what it refuses, and which of its bytes depend on the inputs alone."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_data import METRICS, write_captioner, write_results

from captioning import health_records, paths, work
from captioning.errors import CapstanError
from captioning.params import load_params
from captioning.reporting import provenance
from captioning.reporting.flow import draw_flow
from captioning.reporting.inputs import choose_images, load_inputs, required_inputs
from captioning.reporting.intervals import bootstrap_interval
from captioning.reporting.leaderboard import build_tables, metrics_tree
from captioning.reporting.markdown import escape, render_markdown
from captioning.reporting.statistics import arrange_statistics, format_number
from stages.report import report, select_params

CAPTIONERS = ["lite-lstm", "lite-gru", "blip"]
HOSTILE = '<script>alert(1)</script> | **x** {{ 7*7 }} "q" \u202e \ud83d\ude80 &amp;'


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("captioning.figures.DPI", 40)  # half the time
    write_results(tmp_path, CAPTIONERS)
    return tmp_path


def make_report(**changes: Any) -> str:
    settings: dict[str, Any] = {
        "encoders": ["lite"], "decoders": ["lstm", "gru"], "captioners": CAPTIONERS, "num_images": 3,
        "num_attention_images": 1, "num_beams": 5, "num_blip_beams": 3, "shown_params": {"train": {"seed": 13}},
    }  # fmt: skip
    report(**(settings | changes))
    return (paths.REPORTS / "index.html").read_text("utf-8")


class Tags(HTMLParser):
    """Every tag with its attributes, and that each one is closed in order."""

    VOID = {"meta", "link", "img", "source", "br", "path", "rect"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_holds_everything_and_refers_to_nothing_outside(results: Path) -> None:
    page = make_report()
    tags = Tags(page)
    assert not tags.open
    for section in ("leaderboard", "training", "samples", "attention", "data", "provenance"):
        assert any(attrs.get("id") == section for _, attrs in tags.tags)
    addresses = [attrs[name] for _, attrs in tags.tags for name in ("src", "srcset", "href", "data") if attrs.get(name)]
    assert all(address.startswith(("data:", "#")) for address in addresses if address)
    assert "url(" not in page and "@import" not in page and not any(tag == "script" for tag, _ in tags.tags)
    assert all(attrs.get("alt") for tag, attrs in tags.tags if tag == "img")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in tags.tags if tag == "th")
    assert {path.name for path in Path("reports/figures").iterdir()} >= {
        "loss.png", "learning-rate.png", "validation-cider.png", "cider.png", "cider-by-image.png", "attention.png",
        "caption-lengths.png", "loss-dark.png", "attention-digits__00000.png",
    }  # fmt: skip
    assert not any(Path(".work").rglob("*.png")) and not list(Path("reports").glob("*.tmp"))


def outs() -> dict[str, bytes]:
    files = [path for path in Path("reports").rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def test_only_the_marked_part_of_the_page_differs_between_runs(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_page, first = make_report(), outs()
    make_report()
    assert outs() == first
    Path(".work").mkdir(exist_ok=True)
    Path(".work/times.json").write_text(json.dumps({"train@lite-lstm": 95.2, "train@gone-lstm": 9}))
    Path(".work/report").mkdir(exist_ok=True)
    monkeypatch.setattr(provenance, "_git", lambda *arguments: "0123456789abcdef")
    second_page, second = make_report(), outs()
    assert first.pop("reports/index.html") != second.pop("reports/index.html")
    assert first == second
    assert provenance.without_run(first_page) == provenance.without_run(second_page)
    assert "1 min 35 s" in second_page and "0123456789ab" in second_page and "gone-lstm" not in second_page
    assert "95.2" not in provenance.without_run(second_page) and "0123456789ab" not in first_page


def test_health_stands_in_the_page_alone_and_only_in_the_part_of_the_run(results: Path) -> None:
    first_page, first = make_report(), outs()
    assert "No health record" in first_page
    folder = Path(".work/health")
    folder.mkdir(parents=True)
    for index in range(9):
        record = {"kind": "sample", "run": "a", "elapsed_s": index, "cpu_percent": 61.5, "rss_peak": 1.25e9}
        health_records.append(folder / "train@lite-gru.jsonl", record)
    alert = {"run": "a", "kind": "disk_low", "time": 5, "stage": "train@lite-gru", "message": HOSTILE}
    health_records.append(folder / "alerts.jsonl", alert)
    second_page, second = make_report(), outs()
    assert first.pop("reports/index.html") != second.pop("reports/index.html") and first == second
    assert provenance.without_run(first_page) == provenance.without_run(second_page)
    tags = Tags(second_page)
    assert not tags.open and not any(tag == "script" for tag, _ in tags.tags)
    charts = [attrs for tag, attrs in tags.tags if tag == "svg" and attrs.get("role") == "img"]
    assert [attrs["aria-label"] for attrs in charts if "CPU" in str(attrs)] == ["CPU: mean 62 %, peak 62 %, over 8.0 s"]
    assert "1.2 GB" in second_page and "&lt;script&gt;alert(1)" in second_page and "No alerts" not in second_page


def test_leftovers_of_a_killed_report_do_not_get_into_the_next(results: Path) -> None:
    name = work.fingerprint("report", {"train": {"seed": 13}}, packages=["matplotlib"])
    leftover = paths.work_root() / "report" / name / "outs" / "figures" / "stale.png"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    make_report()
    assert not Path("reports/figures/stale.png").exists() and not leftover.exists()


def test_metrics_hold_numbers_for_each_captioner_in_params_alone(results: Path) -> None:
    test = json.loads(Path("data/prepared/test.json").read_text())
    write_captioner(results, "old-lstm", test, np.random.default_rng(9))
    page = make_report()
    metrics = json.loads(Path("reports/metrics.json").read_text())
    assert list(metrics) == CAPTIONERS
    assert "old-lstm" not in page + Path("reports/report.md").read_text()
    scores = json.loads(Path("reports/scores/lite-gru.json").read_text())["lite-gru"]
    assert metrics["lite-gru"]["CIDEr"] == pytest.approx(scores["CIDEr"], abs=1e-6)
    assert metrics["lite-gru"]["CIDEr_low"] <= scores["CIDEr"] <= metrics["lite-gru"]["CIDEr_high"]
    assert set(metrics["lite-gru"]["by_source"]) == {"digits", "shapes"}
    assert "attention_factor" in metrics["lite-gru"] and "attention_factor" not in metrics["blip"]

    def leaves(tree: Any) -> list[Any]:
        return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]

    assert all(isinstance(leaf, int | float) for leaf in leaves(metrics))


def test_rows_are_ordered_by_cider_and_the_best_is_marked(results: Path) -> None:
    tables = build_tables(load_inputs(CAPTIONERS))
    assert [table.group for table in tables] == ["all", "digits", "shapes"]
    for table in tables:
        ciders = [row.scores["CIDEr"] for row in table.rows]
        assert ciders == sorted(ciders, reverse=True) and table.best("CIDEr") == ciders[0]
        assert table.metrics == ["CIDEr", *METRICS[:-1]]
    # The sources' scores are those of another corpus than the per-image values: no interval there.
    assert all(row.interval for row in tables[0].rows) and not any(row.interval for row in tables[1].rows)
    text = render_markdown(tables, ["Setting."], [])
    best = tables[0].rows[0]
    assert f"| `{best.captioner}` | **{100 * best.scores['CIDEr']:.1f}** |" in text
    assert metrics_tree(tables, CAPTIONERS)["blip"]["num_images"] == 8


def test_one_captioner_alone_is_not_called_the_best(results: Path) -> None:
    page = make_report(captioners=["blip"], encoders=[], decoders=[])
    assert 'class="best"' not in page and 'id="attention"' not in page
    assert "**" not in Path("reports/report.md").read_text()


def test_hostile_captions_are_shown_and_do_nothing(results: Path) -> None:
    for name in CAPTIONERS:
        path = paths.captions(name)
        rows = [{"image_id": row["image_id"], "caption": HOSTILE} for row in json.loads(path.read_text())]
        rows[0]["caption"] = "\ud800 lone"
        rows[1]["caption"] = ""
        path.write_text(json.dumps(rows))
    test = json.loads(paths.split_annotations("test").read_text())
    for annotation in test:
        annotation["captions"] = [HOSTILE, "two\nlines"]
    paths.split_annotations("test").write_text(json.dumps(test))
    page = make_report(num_images=8)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "{{ 7*7 }}" in page
    assert "? lone" in page and "(an empty caption)" in page
    assert not Tags(page).open
    rows = [line for line in Path("reports/report.md").read_text("utf-8").splitlines() if "script" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 4 and "<script" not in row for row in rows)


def test_markdown_cells_stay_in_their_cell() -> None:
    assert escape("a|b\n**c** <d> \\") == "a\\|b \\*\\*c\\*\\* &lt;d&gt; \\\\"


def test_a_missing_input_names_the_stage_that_makes_it(results: Path) -> None:
    needed = dict(required_inputs(CAPTIONERS, 24))
    assert needed[paths.captions("blip")] == "blip" and needed[paths.captions("lite-gru")] == "generate@lite-gru"
    assert paths.attention("blip") not in needed and paths.training("blip") not in needed
    for path, maker in needed.items():
        assert paths.require(path, maker) == path
    shutil.rmtree(paths.training("lite-gru"))
    with pytest.raises(CapstanError, match="train@lite-gru"):
        make_report()


def drop_row(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))


def double_row(path: Path) -> None:
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[0]]))


def rename_row(path: Path) -> None:
    rows = json.loads(path.read_text())
    rows[0]["image_id"] = "shapes/other"
    path.write_text(json.dumps(rows))


def break_format(path: Path) -> None:
    path.write_text(json.dumps({"captions": 1}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [drop_row, double_row, rename_row, break_format, cut])
def test_captions_of_other_images_are_refused(results: Path, damage: Any) -> None:
    damage(paths.captions("lite-gru"))
    with pytest.raises(CapstanError, match="lite-gru.json"):
        make_report()
    assert not Path("reports/index.html").exists()


@pytest.mark.parametrize(
    "path",
    [paths.scores("blip"), paths.image_scores("blip"), paths.attention("lite-lstm"), paths.split_annotations("test")],
)
def test_a_damaged_file_is_named(results: Path, path: Path) -> None:
    cut(path)
    with pytest.raises(CapstanError, match=path.name):
        make_report()


def test_scores_of_another_test_split_are_refused(results: Path) -> None:
    table = pq.read_table(paths.image_scores("blip"))
    pq.write_table(table.slice(1), paths.image_scores("blip"))
    with pytest.raises(CapstanError, match="score@blip"):
        make_report()
    tree = json.loads(paths.scores("lite-gru").read_text())
    tree["lite-gru"]["num_images"] = 3
    paths.scores("lite-gru").write_text(json.dumps(tree))
    with pytest.raises(CapstanError, match="3 images, the test split has 8"):
        make_report()


@pytest.mark.parametrize("text", ["", "step\tother\n1\t2\n", "step\tloss\n1\tx\n", "step\tloss\n1\n"])
def test_a_damaged_history_is_named(results: Path, text: str) -> None:
    (paths.training("lite-gru") / "plots/metrics/train/loss.tsv").write_text(text)
    with pytest.raises(CapstanError, match="loss.tsv"):
        make_report()


def test_images_are_chosen_from_the_sources_in_turn(results: Path) -> None:
    inputs = load_inputs(CAPTIONERS)
    assert [a.source for a in choose_images(inputs, 4)] == ["digits", "shapes", "digits", "shapes"]
    assert len(choose_images(inputs, 99)) == 8
    shutil.rmtree(paths.SAMPLES)
    assert not choose_images(load_inputs(CAPTIONERS), 4)
    assert 'id="samples"' not in make_report()


def test_the_lock_is_read_where_it_can_be(tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    lock.write_text("stages:\n  prepare:\n    outs:\n    - {path: data/prepared, md5: abc.dir, size: 5, nfiles: 2}\n")
    assert provenance.read_lock(["download", "prepare"], lock) == [
        provenance.StageOut("prepare", "data/prepared", "abc.dir", 5, 2)
    ]
    for text in ("", "stages: [", "stages:\n  prepare: 3\n", "\x00"):
        lock.write_text(text)
        assert provenance.read_lock(["prepare"], lock) == []
    assert provenance.read_lock(["prepare"], tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"prepare": "x"}'])
def test_damaged_stage_times_do_not_stop_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    Path(".work").mkdir()
    Path(".work/times.json").write_text(text)
    run = provenance.record_run(["prepare"])
    assert run.seconds == {} and run.machine


def test_the_flow_has_every_stage(results: Path) -> None:
    stages = provenance.stage_names(["lite", "vgg"], ["lstm", "gru", "t"])
    flow = draw_flow(["lite", "vgg"], ["lstm", "gru", "t"])
    assert len(stages) == len(set(stages)) == 2 + 2 + 6 + 6 + 1 + 7
    assert all(f"<title>{name}</title>" in flow for name in [*stages, "report"])


def test_statistics_are_sorted_by_what_they_are() -> None:
    tree = {"vocabulary": {"size": 9}, "train": {"num_images": 3, "length_histogram": {"2": 5}},
            "sources": {"s": {"train": {"num_images": 1, "length_histogram": {"2": 1}}}}}  # fmt: skip
    statistics = arrange_statistics(tree)
    assert statistics.single == {"vocabulary · size": 9}
    assert statistics.by_split == {"": {"images": {"train": 3}}, "s": {"images": {"train": 1}}}
    assert statistics.lengths == {"train": {2: 5}}
    assert format_number("unknown rate", 0.0123) == "1.23 %" and format_number("words", 24150) == "24\u202f150"


def test_intervals_hold_the_mean_and_narrow_with_more_images() -> None:
    values = np.random.default_rng(1).normal(1, 0.5, 400)
    few, many = bootstrap_interval(values[:40]), bootstrap_interval(values)
    assert many == bootstrap_interval(values)
    assert few.low < few.mean < few.high and many.high - many.low < few.high - few.low
    # The normal approximation of the same interval.
    assert (many.high - many.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.15)
    assert bootstrap_interval([1.0, 5.0], [1, 2]).mean == pytest.approx(2)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


def test_numbers_and_durations_for_people() -> None:
    assert [provenance.format_seconds(s) for s in (0.84, 42, 185, 7800)] == [
        "0.8 s",
        "42 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert [provenance.format_bytes(n) for n in (None, 512, 1_400_000)] == ["", "512 B", "1.4 MB"]


def test_params_shown_are_those_in_use() -> None:
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    shown = select_params(params)
    assert list(shown["source_settings"]) == params.data.sources
    assert "monitoring" not in shown
    assert list(shown["encoder_settings"]) == params.encoders and shown["train"] == params.train.model_dump(mode="json")
