"""Caches an encoder's region features: one HDF5 file a shard.

    python -m stages.features efficientnet_lite0

A killed run goes on at the next shard: finished files wait in .work/features/ until all are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from captioning import paths, stage, storage


def features(
    encoder_name: str, weights: str, shards: Path, out: Path, batch_size: int, num_workers: int, precision: str
) -> None:
    """Encodes every image of every shard and publishes `out` when all shards are done."""
    import captioning.extraction as extraction
    from captioning.encoders import build_encoder

    encoder = build_encoder(encoder_name, weights)
    shard_paths = sorted(shards.glob("*.tar"))
    settings = {"encoder": encoder.describe(), "precision": precision, "batch_size": batch_size}
    name = storage.fingerprint("features", settings, [shards / "ledger.parquet"], ["torch", "pillow"])
    work = storage.work_folder("features", name)
    extraction.extract_features(encoder, shard_paths, work, batch_size, num_workers, precision)
    storage.publish(work, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="a name from `encoders` in params.yaml")
    args = parser.parse_args()
    from captioning.params import load_params

    params = load_params()
    from captioning.encoders import check_encoder

    check_encoder(args.encoder)
    features(
        args.encoder,
        params.encoder_settings[args.encoder].weights,
        shards=paths.require(paths.LEDGER, "download").parent,
        out=paths.features(args.encoder),
        batch_size=params.features.batch_size,
        num_workers=params.features.num_workers,
        precision=params.features.precision,
    )


if __name__ == "__main__":
    stage.run(main)
