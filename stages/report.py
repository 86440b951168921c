"""Draws the report from captions, scores, attention and training histories: `python -m stages.report`.

Writes reports/metrics.json and reports/report.md (git), reports/figures/ and reports/index.html (DVC). Shards, features
and models may be absent. The same inputs give the same bytes, but for the part of index.html that tells about this run
(captioning/reporting/provenance.py). O(20 s).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from captioning import paths, stage, storage, tracked
from captioning.work import fingerprint, open_work

if TYPE_CHECKING:
    from pathlib import Path

    from captioning.params import Params
    from captioning.reporting.inputs import ReportInputs
    from captioning.reporting.leaderboard import Table
    from captioning.reporting.page import Page

NUM_EXAMPLES = 5


def report(
    *,
    encoders: list[str],
    decoders: list[str],
    captioners: list[str],
    num_images: int,
    num_attention_images: int,
    num_beams: int,
    num_blip_beams: int,
    shown_params: dict[str, Any],
) -> None:
    """Reads the named captioners' results and publishes the four outs.

    Args:
        captioners: in the order of params; all others' files are ignored.
        num_images: sample images with captions.
        num_attention_images: images with word-by-word attention maps.
        shown_params: the params as the page prints them.

    Raises:
        CapstanError: a damaged input, or captioners whose images are not those of the test split.
    """
    from captioning.reporting import leaderboard
    from captioning.reporting.inputs import load_inputs
    from captioning.reporting.markdown import render_markdown
    from captioning.reporting.page import render_page

    inputs = load_inputs(captioners)
    tables = leaderboard.build_tables(inputs)
    setting = describe_setting(inputs, num_beams, num_blip_beams)
    name = fingerprint("report", shown_params, packages=["matplotlib"])
    with open_work("report", name, about={"captioners": captioners}) as work:
        built = work.folder / "outs"
        storage.remove(built)  # a killed report is drawn anew: it takes seconds
        figures = built / "figures"
        figures.mkdir(parents=True)
        page = build_page(
            inputs, tables, setting, figures, encoders, decoders, num_images, num_attention_images, shown_params
        )
        (built / "index.html").write_text(render_page(page), "utf-8")
        (built / "report.md").write_text(render_markdown(tables, setting, pick_examples(inputs, tables)), "utf-8")
        storage.write_json(built / "metrics.json", leaderboard.metrics_tree(tables, captioners))
        for out in ("figures", "index.html", "report.md", "metrics.json"):
            storage.publish(built / out, paths.REPORTS / out)
        storage.remove(built)
        work.published()


def build_page(
    inputs: ReportInputs,
    tables: list[Table],
    setting: list[str],
    figures: Path,
    encoders: list[str],
    decoders: list[str],
    num_images: int,
    num_attention_images: int,
    shown_params: dict[str, Any],
) -> Page:
    """Draws the figures into the folder `figures` and gathers all that index.html shows."""
    from captioning.reporting import illustrations, provenance
    from captioning.reporting.flow import draw_flow
    from captioning.reporting.health import read_health
    from captioning.reporting.inputs import choose_images
    from captioning.reporting.page import Page, summarize_training
    from captioning.reporting.statistics import arrange_statistics

    statistics = arrange_statistics(inputs.statistics)
    captioners = [result.name for result in inputs.captioners]
    stages = provenance.stage_names(encoders, decoders)
    return Page(
        tables=tables,
        captioners=captioners,
        setting=setting,
        figures=illustrations.draw_figures(figures, captioners, inputs, tables, statistics),
        training=[summarize_training(result.name, result.curves) for result in inputs.captioners if result.curves],
        samples=illustrations.build_samples(inputs, choose_images(inputs, num_images)),
        attention=illustrations.build_attention(
            figures, captioners, inputs, choose_images(inputs, num_attention_images, with_boxes=True)
        ),
        statistics=statistics,
        params=_to_yaml(shown_params),
        outs=provenance.read_lock(stages),
        flow=draw_flow(encoders, decoders),
        run=provenance.record_run(stages),
        health=read_health(stages, captioners, paths.work_root() / "health"),
    )


def describe_setting(inputs: ReportInputs, num_beams: int, num_blip_beams: int) -> list[str]:
    """Sentences without which the numbers mean little: split, references, tokeniser, beams."""
    counts = sorted({len(annotation.captions) for annotation in inputs.test})
    references = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    sources = ", ".join(sorted({annotation.source for annotation in inputs.test}))
    return [
        f"Test split of {sources}: {len(inputs.test)} images with {references} references each.",
        "Metrics as pycocoevalcap computes them over PTB tokens, × 100.",
        f"Beam search: {num_beams} beams for trained pairs, {num_blip_beams} for BLIP.",
    ]


def pick_examples(inputs: ReportInputs, tables: list[Table]) -> list[tuple[str, str, str]]:
    """(image id, a reference, the best captioner's caption) of a few sample images."""
    from captioning.reporting.inputs import choose_images

    best = next(result for result in inputs.captioners if result.name == tables[0].rows[0].captioner)
    chosen = choose_images(inputs, NUM_EXAMPLES)
    return [(a.image_id, a.captions[0] if a.captions else "", best.captions[a.image_id]) for a in chosen]


def select_params(params: Params) -> dict[str, Any]:
    """The params as plain values, less the settings of sources, encoders and decoders that are not used.

    `recovery`, `monitoring` and `logging` change no result, and addresses may hold passwords.
    """
    tree = params.model_dump(mode="json", exclude={"logging", "monitoring", "recovery"})
    used = {
        "source_settings": params.data.sources,
        "encoder_settings": params.encoders,
        "decoder_settings": params.decoders,
    }
    return {key: {name: value[name] for name in used[key]} if key in used else value for key, value in tree.items()}


def _to_yaml(tree: dict[str, Any]) -> str:
    import io

    from ruamel.yaml import YAML

    buffer = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style, writer.sort_base_mapping_type_on_output = False, False  # type: ignore[assignment]
    writer.dump(tree, buffer)
    return buffer.getvalue()


def main() -> None:
    argparse.ArgumentParser(prog="python -m stages.report", description=__doc__).parse_args()
    from captioning.params import load_params
    from captioning.reporting.inputs import required_inputs

    params = load_params()
    captioners = params.captioners()
    with stage.running(params):
        for path, maker in required_inputs(captioners, params.prepare.num_samples):
            tracked.require(path, maker)
        report(
            encoders=params.encoders,
            decoders=params.decoders,
            captioners=captioners,
            num_images=params.report.num_images,
            num_attention_images=params.report.num_attention_images,
            num_beams=params.generate.num_beams,
            num_blip_beams=params.blip.num_beams,
            shown_params=select_params(params),
        )
    print(f"report: {len(captioners)} captioners, {paths.REPORTS / 'index.html'}")


if __name__ == "__main__":
    stage.run(main)
