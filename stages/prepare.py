"""Cleans captions and makes annotations, the vocabulary (from train alone), statistics and the report's thumbnails.

python -m stages.prepare
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from captioning import paths, stage, storage
from captioning.work import fingerprint, open_work

if TYPE_CHECKING:
    from captioning.annotations import Annotation

THUMBNAIL_PX = 224


def prepare(
    shards: Path,
    out: Path,
    statistics_out: Path,
    lowercase: bool,
    min_frequency: int | Literal["auto"],
    max_length_percentile: float,
    num_samples: int,
    seed: int,
) -> None:
    """Reads the ledger of `shards`; writes `<split>.json`, `images.json`, `vocabulary.json`, `samples/`, statistics."""
    from captioning import preparation
    from captioning.annotations import dump_annotations
    from captioning.heuristics import resolve_min_frequency

    settings = [lowercase, min_frequency, max_length_percentile, num_samples, seed]
    name = fingerprint("prepare", settings, [shards / paths.LEDGER.name], ["numpy", "pillow"])
    with open_work("prepare", name, about={"shards": str(shards)}) as work:
        annotations = preparation.read_ledger(shards / paths.LEDGER.name, lowercase)
        by_split = {split: [a for a in annotations if a.split == split] for split in paths.SPLITS}
        num_captions = sum(len(annotation.captions) for annotation in by_split["train"])
        threshold = resolve_min_frequency(min_frequency, num_captions)
        if threshold != min_frequency:
            print(f"min_frequency {threshold} (auto: {num_captions} captions in train)")
        vocabulary = preparation.build_vocabulary(by_split["train"], threshold, max_length_percentile, lowercase)
        samples = work.folder / "samples"
        _write_thumbnails(shards, preparation.choose_samples(by_split["test"], num_samples, seed), samples)
        for split, members in by_split.items():
            storage.write_json(out / f"{split}.json", dump_annotations(members))
        images = [annotation.model_dump(exclude={"captions", "boxes"}) for annotation in annotations]
        storage.write_json(out / "images.json", images)
        vocabulary.save(out / "vocabulary.json")
        storage.publish(samples, out / "samples")
        figures = preparation.statistics(annotations, vocabulary)
        storage.write_json(statistics_out, figures)
        work.published()
    for split in paths.SPLITS:
        part = figures[split]
        print(
            f"{split}: {part['num_images']} images, {part['num_captions']} captions, {part['unknown_rate']:.2%} unknown"
        )
    print(f"vocabulary: {len(vocabulary)} words, captions of at most {vocabulary.max_length} words")


def _write_thumbnails(shards: Path, samples: list[Annotation], folder: Path) -> None:
    from PIL import Image

    from captioning.images import decode_image
    from captioning.shards import iterate_shard, verify_shards

    storage.remove(folder)  # a killed run's are drawn anew: it takes seconds
    folder.mkdir()
    verify_shards(shards, {a.shard for a in samples})
    wanted = {(a.shard, a.key): a.image_id.replace("/", "__") for a in samples}
    for shard in sorted({a.shard for a in samples}):
        for key, image, _ in iterate_shard(shards / f"{shard}.tar"):
            if (shard, key) in wanted:
                thumbnail = Image.fromarray(decode_image(image))
                thumbnail.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR)
                buffer = io.BytesIO()
                thumbnail.save(buffer, "JPEG", quality=88)
                (folder / f"{wanted[shard, key]}.jpg").write_bytes(buffer.getvalue())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from captioning.params import load_params

    params = load_params()
    with stage.running(params):
        shards = paths.require(paths.LEDGER, "download").parent
        prepare(shards, paths.PREPARED, paths.STATISTICS, **params.prepare.model_dump())


if __name__ == "__main__":
    stage.run(main)
