"""Cleans captions and makes annotations, the vocabulary (from train alone), statistics and the report's thumbnails.

python -m stages.prepare
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

from captioning import paths, stage, storage

if TYPE_CHECKING:
    from captioning.annotations import Annotation

THUMBNAIL_PX = 224


def prepare(
    shards: Path,
    out: Path,
    statistics_out: Path,
    lowercase: bool,
    min_frequency: int,
    max_length_percentile: float,
    num_samples: int,
    seed: int,
) -> None:
    """Reads the ledger of `shards`; writes `<split>.json`, `images.json`, `vocabulary.json`, `samples/`, statistics."""
    from captioning import preparation
    from captioning.annotations import dump_annotations

    annotations = preparation.read_ledger(shards / "ledger.parquet", lowercase)
    by_split = {split: [a for a in annotations if a.split == split] for split in paths.SPLITS}
    vocabulary = preparation.build_vocabulary(by_split["train"], min_frequency, max_length_percentile, lowercase)
    samples = preparation.choose_samples(by_split["test"], num_samples, seed)
    work = storage.work_folder("prepare", "samples")
    _write_thumbnails(shards, samples, work)
    for split, members in by_split.items():
        storage.write_json(out / f"{split}.json", dump_annotations(members))
    images = [annotation.model_dump(exclude={"captions", "boxes"}) for annotation in annotations]
    storage.write_json(out / "images.json", images)
    vocabulary.save(out / "vocabulary.json")
    storage.publish(work, out / "samples")
    figures = preparation.statistics(annotations, vocabulary)
    storage.write_json(statistics_out, figures)
    for split in paths.SPLITS:
        part = figures[split]
        print(
            f"{split}: {part['num_images']} images, {part['num_captions']} captions, {part['unknown_rate']:.2%} unknown"
        )
    print(f"vocabulary: {len(vocabulary)} words, captions of at most {vocabulary.max_length} words")


def _write_thumbnails(shards: Path, samples: list[Annotation], folder: Path) -> None:
    from PIL import Image

    from captioning.images import decode_image
    from captioning.shards import iterate_shard

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
    settings = params.prepare.model_dump()
    prepare(paths.require(paths.LEDGER, "download").parent, paths.PREPARED, paths.STATISTICS, **settings)


if __name__ == "__main__":
    stage.run(main)
