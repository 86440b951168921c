"""Caches an encoder's region features: one HDF5 file a shard.

    python -m stages.features efficientnet_lite0

A killed run goes on at the next shard: finished files wait in .work/features/ until all are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from captioning import paths, stage, storage, work


def features(
    encoder_name: str,
    weights: str,
    shards: Path,
    out: Path,
    num_processes: int,
    batch_size: int | Literal["auto"],
    num_workers: int,
    precision: str,
    grid: tuple[int, int] | None,
    class_token: bool,
    views: list[str],
) -> None:
    """Encodes every image of every shard and publishes `out` when all shards are done; processes share the shards.

    Raises:
        CapstanError: no shards, a damaged one, or one without images.
    """
    from captioning import extraction
    from captioning.distributed import join_world
    from captioning.encoders import build_encoder
    from captioning.errors import CapstanError
    from captioning.precision import describe_arithmetic
    from captioning.shards import verify_shards

    shard_paths = sorted(shards.glob("*.tar"))
    if not shard_paths:
        raise CapstanError(f"{shards} holds no .tar: run `dvc repro download`")
    encoder = build_encoder(encoder_name, weights, grid, class_token)
    settings: dict[str, object] = {"encoder": encoder.describe(), "precision": precision, "views": views}
    settings |= {"batch_size": batch_size, "arithmetic": [num_processes, *describe_arithmetic(precision)]}
    name = work.fingerprint("features", settings, [shards / paths.LEDGER.name], ["torch", "pillow", "numpy", "h5py"])
    with join_world() as world, work.open_work("features", name, settings, world) as found:
        missing = extraction.missing_shards(encoder, shard_paths, found.folder, views) if world.is_main else []
        if world.is_main:
            verify_shards(shards, [path.stem for path in missing])
        todo = [shards / tar for tar in world.share([path.name for path in missing])]
        mine = [todo[i] for i in world.part(len(todo))]
        extraction.extract_features(encoder, mine, found.folder, batch_size, num_workers, precision, views, world)
        world.wait()
        if world.is_main:
            storage.publish(found.folder, out, [f"{shard.stem}.h5" for shard in shard_paths])
            found.published()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="a name from `encoders` in params.yaml")
    args = parser.parse_args()
    from captioning.params import load_params

    params = load_params()
    from captioning.encoders import check_encoder
    from captioning.views import check_views

    check_encoder(args.encoder)
    check_views(params.features.views)
    shards = paths.require(paths.LEDGER, "download").parent
    if stage.run_processes(params.features.num_processes, params.recovery.max_restarts):
        return
    from captioning.precision import keep_memory

    keep_memory()  # before the first thread, which is that of monitoring
    with stage.running(params):
        features(
            args.encoder,
            params.encoder_settings[args.encoder].weights,
            shards=shards,
            out=paths.features(args.encoder),
            **params.features.model_dump(),
        )


if __name__ == "__main__":
    stage.run(main)
