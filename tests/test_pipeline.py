"""dvc.yaml against stages and params, then the real `dvc` on tiny data in temporary clones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from clone import GRU, LSTM, ROOT, Clone, stages_run
from imports import import_closure
from ruamel.yaml import YAML

CHAIN_LSTM = [f"train@{LSTM}", f"generate@{LSTM}", f"score@{LSTM}", "report"]


def load_yaml(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(ROOT / name)


STAGES = load_yaml("dvc.yaml")["stages"]


# dvc.yaml as a text


@pytest.mark.parametrize("name", STAGES)
def test_code_deps_are_exactly_what_the_stage_imports(name: str) -> None:
    stage = STAGES[name]
    script = ROOT / "stages" / f"{stage['cmd'].split()[2].removeprefix('stages.')}.py"
    listed = {dep for dep in stage["deps"] if dep.startswith(("stages/", "captioning/")) and dep.endswith(".py")}
    assert listed == import_closure(script)


def test_every_stage_file_has_its_stage() -> None:
    commands = {stage["cmd"].split()[2] for stage in STAGES.values()}
    assert commands == {f"stages.{p.stem}" for p in (ROOT / "stages").glob("*.py") if p.stem != "__init__"}


def test_stages_import_no_stage_and_the_library_imports_none() -> None:
    for path in [*(ROOT / "stages").glob("*.py"), *(ROOT / "captioning").rglob("*.py")]:
        imported = {file for file in import_closure(path) if file.startswith("stages/")}
        assert imported <= {str(path.relative_to(ROOT))}, path


def test_only_stages_and_the_command_line_read_params() -> None:
    readers = [p for p in (ROOT / "captioning").rglob("*.py") if "load_params" in p.read_text()]
    assert {p.name for p in readers} == {"params.py", "cli.py"}


def test_every_listed_param_exists() -> None:
    params = load_yaml("params.yaml")
    for stage in STAGES.values():
        for key in stage["params"]:
            place, *rest = (
                key.replace("${item.encoder}", "efficientnet_lite0").replace("${item.decoder}", "lstm").split(".")
            )
            value = params[place]
            for part in rest:
                value = value[part]


def test_no_param_is_named_size_or_nfiles() -> None:
    """The run cache ignores such keys and would return stale outputs (dvc#10296)."""

    def keys(tree: Any) -> set[str]:
        if not isinstance(tree, dict):
            return set()
        return set(tree) | {key for value in tree.values() for key in keys(value)}

    assert not keys(load_yaml("params.yaml")) & {"size", "nfiles"}


def test_no_persisted_outs_and_no_shell() -> None:
    text = (ROOT / "dvc.yaml").read_text()
    assert "persist" not in text
    assert all(set(stage["cmd"]).isdisjoint("|&;<>`\n") for stage in STAGES.values())


# Real runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone after one whole `dvc repro`, committed; tests take copies."""
    clone = Clone.make(tmp_path_factory.mktemp("pipeline") / "clone")
    output = clone.dvc("repro")
    assert len(stages_run(output)) == len(set(stages_run(output))) == 12
    clone.commit("run")
    return clone


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    return finished.copy(tmp_path / "clone")


def test_a_second_run_does_nothing_and_the_lock_is_true(clone: Clone, tmp_path: Path) -> None:
    assert "up to date" in clone.dvc("repro")
    assert "up to date" in clone.dvc("status")
    assert clone.run("git", "status", "--porcelain") == ""
    bare = Clone(tmp_path / "bare")
    clone.run("git", "clone", "-q", str(clone.path), str(bare.path))
    assert not (bare.path / "data/shards").exists()
    assert stages_run(bare.dvc("repro", "--dry", "--allow-missing")) == []


def test_results_keep_their_contracts(finished: Clone) -> None:
    data = finished.path / "data"
    test = json.loads((data / "prepared/test.json").read_text())
    wanted = sorted(annotation["image_id"] for annotation in test)
    for captioner in (LSTM, GRU, "blip"):
        results = json.loads((data / f"captions/{captioner}.json").read_text())
        assert [result["image_id"] for result in results] == wanted
        scores = json.loads((finished.path / f"reports/scores/{captioner}.json").read_text())[captioner]
        assert scores["num_images"] == len(wanted) and set(scores["by_source"]) == {"shapes", "digits"}
    images = json.loads((data / "prepared/images.json").read_text())
    assert all(set(image) == {"image_id", "source", "split", "shard", "key"} for image in images)
    words = set(json.loads((data / "prepared/vocabulary.json").read_text())["words"])
    train = json.loads((data / "prepared/train.json").read_text())
    assert words - {"<pad>", "<bos>", "<eos>", "<unk>"} <= {w for a in train for c in a["captions"] for w in c.split()}
    assert not list((finished.path / ".work").rglob("*.tmp"))


def test_metrics_and_plots_are_seen_by_dvc(finished: Clone) -> None:
    metrics = json.loads(finished.dvc("metrics", "show", "--json"))[""]["data"]
    assert {f"reports/scores/{c}.json" for c in (LSTM, GRU, "blip")} <= set(metrics)
    assert f"reports/training/{LSTM}/metrics.json" in metrics and "reports/data.json" in metrics
    targets = finished.dvc("plots", "show", "--json", f"reports/training/{LSTM}/plots/metrics")
    assert "val" in targets and "CIDEr" in targets


def test_one_decoders_param_reruns_its_chain_alone(clone: Clone) -> None:
    clone.set({"decoder_settings": {"lstm": {"dropout": 0.1}}})
    assert stages_run(clone.dvc("repro")) == CHAIN_LSTM
    clone.set({"decoder_settings": {"lstm": {"dropout": 0.3}}})
    output = clone.dvc("repro")
    # Reverted: from the run cache. DVC keeps none for a stage with a git-tracked out that is no metric (report.md).
    assert stages_run(output) == ["report"] and output.count("is cached - skipping run") == 3


def test_an_encoder_comes_and_goes(clone: Clone) -> None:
    grown = ["-S", "encoders=[efficientnet_lite0,resnet50]", "-S", "encoder_settings.resnet50.weights=random"]
    ran = stages_run(clone.dvc("exp", "run", *grown))
    assert all("resnet50" in name for name in ran if name != "report") and ran[-1] == "report" and len(ran) == 8
    assert "resnet50-gru" in (clone.path / "reports/report.md").read_text()
    assert stages_run(clone.dvc("exp", "run", "-S", "encoders=[efficientnet_lite0]")) in ([], ["report"])
    assert "resnet50" not in (clone.path / "reports/report.md").read_text()
    assert "resnet50" not in json.dumps(json.loads((clone.path / "reports/metrics.json").read_text()))


def test_clean_names_what_no_captioner_owns_and_deletes_it_only_when_told(clone: Clone) -> None:
    stale = ["data/features/resnet50", "data/models/resnet50-lstm", "reports/training/resnet50-lstm"]
    for name in stale:
        (clone.path / name).mkdir()
    (clone.path / "reports/scores/resnet50-lstm.json").write_text("{}")
    named = clone.run("python", "-m", "captioning", "clean")
    for name in [*stale, "reports/scores/resnet50-lstm.json"]:
        assert f"stale: {name}" in named and (clone.path / name).exists()
    assert "efficientnet" not in named
    clone.run("python", "-m", "captioning", "clean", "--force")
    assert not any((clone.path / name).exists() for name in stale)
    assert "nothing is stale" in clone.run("python", "-m", "captioning", "clean")
    assert "up to date" in clone.dvc("status")


def test_queued_experiments_and_their_differences(clone: Clone) -> None:
    for name, rate in (("slow", "5e-4"), ("fast", "2e-2")):
        clone.dvc("exp", "run", "--queue", "-n", name, "-S", f"decoder_settings.lstm.learning_rate={rate}")
    clone.dvc("queue", "start", "-j", "2")
    for name in ("slow", "fast"):
        clone.dvc("queue", "logs", "-f", name)
    states = clone.dvc("queue", "status")
    assert states.count("Success") == 2, states
    clone.dvc("queue", "stop", code=None)
    values = {}
    for name in ("slow", "fast"):
        clone.dvc("exp", "apply", name)
        params = YAML(typ="safe", pure=True).load(clone.path / "params.yaml")
        values[name] = params["decoder_settings"]["lstm"]["learning_rate"]
    assert values == {"slow": 0.0005, "fast": 0.02}
    difference = json.loads(clone.dvc("metrics", "diff", "slow", "fast", "--json"))
    training = difference[f"reports/training/{LSTM}/metrics.json"]
    assert any(entry.get("diff") for entry in training.values()), training
    assert f"reports/training/{GRU}/metrics.json" not in difference
    clone.dvc("plots", "diff", "slow", "fast", "-o", "plots")
    page = (clone.path / "plots/index.html").read_text()
    assert "slow" in page and "fast" in page and "CIDEr" in page
    shown = clone.dvc("exp", "show", "--csv", "--drop", ".*_settings.*")
    assert "slow" in shown and "fast" in shown


def test_the_report_is_rebuilt_without_shards_features_and_models(clone: Clone, tmp_path: Path) -> None:
    clone.dvc("remote", "add", "-d", "store", str(tmp_path / "store"))
    clone.dvc("push")
    clone.commit("remote")
    bare = Clone(tmp_path / "bare")
    clone.run("git", "clone", "-q", str(clone.path), str(bare.path))
    bare.dvc("pull", "prepare", "generate", "blip", "score", "score-blip")
    bare.set({"report": {"num_images": 1}})
    assert stages_run(bare.dvc("repro", "--allow-missing", "report")) == ["report"]
    for name in ("shards", "features", "models"):
        folder = bare.path / "data" / name
        assert not folder.exists() or [p.name for p in folder.rglob("*") if p.is_file()] in ([], [".gitignore"])
    assert "data:image/jpeg;base64" in (bare.path / "reports/index.html").read_text()


MISSING = [
    ("prepare", [], "data/shards", "dvc repro download"),
    ("features", ["efficientnet_lite0"], "data/shards", "dvc repro download"),
    (
        "train",
        ["efficientnet_lite0", "lstm"],
        "data/features/efficientnet_lite0",
        "dvc repro features@efficientnet_lite0",
    ),
    ("train", ["efficientnet_lite0", "lstm"], "data/prepared/train.json", "dvc repro prepare"),
    ("generate", ["efficientnet_lite0", "lstm"], f"data/models/{LSTM}", f"dvc repro train@{LSTM}"),
    ("blip", [], "data/prepared/vocabulary.json", "dvc repro prepare"),
    ("score", [LSTM], f"data/captions/{LSTM}.json", f"dvc repro generate@{LSTM}"),
    ("report", [], "data/captions/blip.json", "dvc repro blip"),
    ("report", [], f"reports/scores/{GRU}.json", f"dvc repro score@{GRU}"),
]


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
@pytest.mark.parametrize(("name", "arguments", "path", "advice"), MISSING)
def test_a_missing_or_empty_input_names_the_stage_to_run(clone: Clone, name, arguments, path, advice, empty) -> None:
    target = clone.path / path
    is_folder = target.is_dir()
    shutil.rmtree(target) if is_folder else target.unlink()
    if empty:
        target.mkdir() if is_folder else target.touch()
    output = clone.stage(name, *arguments, code=1)
    assert "is missing or empty" in output and advice in output and "Traceback" not in output


def test_bad_params_stop_a_run_and_lose_nothing(clone: Clone) -> None:
    clone.set({"train": {"clip_nrm": 1}})
    output = clone.dvc("repro", code=None)
    assert "train.clip_nrm: unknown key (did you mean clip_norm?)" in output
    assert "Traceback" not in output
    assert (clone.path / f"data/captions/{GRU}.json").exists()
    output = clone.dvc("exp", "run", "-S", "generate.num_beams=five", code=None)
    assert "generate.num_beams: Input should be a valid integer" in output
    clone.run("git", "checkout", ".")
    clone.dvc("checkout")
    assert "up to date" in clone.dvc("status")


def test_an_unknown_decoder_is_refused_by_name(clone: Clone) -> None:
    output = clone.dvc("exp", "run", "-S", "decoder_settings.lstm.type=lstn", code=None)
    assert "unknown decoder type 'lstn'. Did you mean 'lstm'?" in output


def test_names_of_stages_show_in_help_at_once(clone: Clone) -> None:
    for name in ("download", "prepare", "features", "train", "generate", "blip", "score", "report"):
        output = clone.stage(name, "--help")
        assert f"python -m stages.{name}" in output


def test_the_same_seed_gives_the_same_outs(clone: Clone) -> None:
    """Everything again, from nothing: dvc.lock must not change but for nothing at all."""
    before = (clone.path / "dvc.lock").read_text()
    shutil.rmtree(clone.path / ".work")
    for stage in ("download", "prepare", "features", f"train@{LSTM}", f"generate@{LSTM}", "blip", f"score@{LSTM}"):
        clone.dvc("repro", "--force", "--single-item", stage)
    assert (clone.path / "dvc.lock").read_text() == before
