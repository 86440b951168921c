"""SPICE through its jar, for those who have the CoreNLP models that it needs; no package ships them.

Anderson, Fernando, Johnson, Gould: "SPICE: Semantic Propositional Image Caption Evaluation" (ECCV 2016).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from captioning.errors import CapstanError
from captioning.metrics.java import OPTIONS, find_java, package_folder
from captioning.orphans import bound_to_parent

Process = subprocess.Popen[bytes]
MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
TIMEOUT_S = 3600.0
# SPICE parses by reflection into the JDK, which Java 16+ forbids unless it is told otherwise.
OPENED = ("--add-opens=java.base/java.lang=ALL-UNNAMED", "--add-opens=java.base/java.util=ALL-UNNAMED")


def find_models(root: Path | None) -> list[Path]:
    """The CoreNLP jars in `root` or `root/lib`.

    Raises:
        CapstanError: a jar is missing; says where from and where to.
    """
    if root is None:
        raise CapstanError(
            f"SPICE needs {' and '.join(MODELS)} (from stanford-corenlp-full-2015-12-09.zip of Stanford NLP): "
            "put them into a folder and name it in score.spice_root, or take SPICE out of score.metrics"
        )
    found = []
    for name in MODELS:
        places = [folder / name for folder in (root, root / "lib") if (folder / name).is_file()]
        if not places:
            raise CapstanError(f"score.spice_root: {root} holds no {name}, which SPICE needs")
        found.append(places[0].resolve())
    return found


def score_spice(
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    root: Path | None,
    started: Callable[[Process], object],
) -> NDArray[np.float64]:
    """Each image's F-score over scene-graph tuples; 0 where there is none (an empty caption).

    `started` receives the process, so that it can be stopped from outside.

    Raises:
        CapstanError: no models, or the program fails or hangs.
    """
    models = find_models(root)
    package = package_folder("spice")
    jars = [package / "spice-1.0.jar", *sorted((package / "lib").glob("*.jar")), *models]
    entries = [
        {"image_id": number, "test": hypothesis, "refs": list(captions)}
        for number, (captions, hypothesis) in enumerate(zip(references, hypotheses, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "captions.json"), Path(folder, "scores.json")
        source.write_text(json.dumps(entries), "utf-8")
        command = [str(find_java()), *OPTIONS, *OPENED, "-Xmx8G", "-cp", os.pathsep.join(map(str, jars))]
        _run([*command, "edu.anu.spice.SpiceScorer", str(source), "-out", str(target), "-subset", "-silent"], started)
        return _read_scores(target, len(entries))


def _run(command: list[str], started: Callable[[Process], object]) -> None:
    # It reads files, so it would not notice, as METEOR does by its closed input, that nobody waits for it any more.
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        with subprocess.Popen(bound_to_parent(command), stdin=nothing, stdout=nothing, stderr=pipe) as process:
            started(process)
            try:
                said = process.communicate(timeout=TIMEOUT_S)[1]
            except BaseException:
                process.kill()
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CapstanError(f"SPICE did not run: {error}") from error
    if process.returncode:
        raise CapstanError(f"SPICE failed: {said.decode(errors='replace')[-500:].strip()}")


def _read_scores(path: Path, num_images: int) -> NDArray[np.float64]:
    try:
        scores = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(path.read_text("utf-8"))}
        values = [float("nan") if scores[number] is None else float(scores[number]) for number in range(num_images)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CapstanError(f"SPICE's answer cannot be read: {error!r}") from error
    return np.array([0.0 if math.isnan(value) else value for value in values])
