"""Makes shards of all images of `data.sources`, and a ledger of what became of each.

    python -m stages.download

Reads params.yaml (data, source_settings, download); writes data/shards/NNNNN.tar and data/shards/ledger.parquet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from captioning import paths, stage, storage
from captioning.errors import CapstanError
from captioning.params import DownloadParams, load_params
from captioning.shard_builder import finished_rows, forget_transient, make_chunks, tar_digests
from captioning.shard_workers import build_chunks
from captioning.shards import SUCCESS, TARS, LedgerRow, summarise, write_ledger
from captioning.source_params import SourceSettings
from captioning.sources import build_table
from captioning.sources.table import check_table
from captioning.work import fingerprint, open_work

STAGE = "download"


def download(*, sources: list[str], source_settings: SourceSettings, download: DownloadParams, target: Path) -> None:
    """Builds the table, then its shards, and publishes them as `target`.

    Finished shards of an interrupted run with the same settings are kept.

    Raises:
        CapstanError: bad settings or data; a failure rate above `download.max_failure_rate` (nothing is published, and
            the ledger is kept in the work folder).
    """
    used = {name: getattr(source_settings, name, None) for name in sources}
    settings = {name: value and value.model_dump(mode="json") for name, value in used.items()}
    name = fingerprint(STAGE, [settings, download.model_dump()], packages=["pillow", "numpy"])
    with open_work(STAGE, name, about={"sources": settings, "download": download.model_dump()}) as work:
        shards = build_shards(sources, source_settings, download, work.folder)
        storage.publish(shards, target)
        work.published()


def build_shards(sources: list[str], source_settings: SourceSettings, download: DownloadParams, folder: Path) -> Path:
    """Makes what is not yet there; returns the folder of shards and ledger, with nothing else in it."""
    table = build_table(sources, source_settings, folder / "sources", download.seed)
    check_table(table)
    chunks = make_chunks(table, download.samples_per_shard, folder)
    missing = [chunk for chunk in chunks if finished_rows(chunk) is None]
    if len(missing) < len(chunks):
        num_done = len(chunks) - len(missing)
        print(f"resumed: {num_done} of {len(chunks)} shards verified, {len(missing)} left", flush=True)
    if missing:
        build_chunks(missing, download, folder)
    rows = [row for chunk in chunks for row in finished_rows(chunk) or []]
    assert len(rows) == len(table), "every row has an outcome"
    ledger = folder / "shards" / paths.LEDGER.name
    write_ledger(ledger, rows, {TARS: json.dumps(tar_digests(chunks))})
    print("\n".join(summarise(rows)), flush=True)
    try:
        check_failures(rows, download.max_failure_rate, ledger)
    except CapstanError:
        forget_transient(chunks)
        raise
    expected = {chunk.tar.name for chunk in chunks} | {ledger.name}
    for stray in [path for path in ledger.parent.iterdir() if path.name not in expected]:
        storage.remove(stray)
    return ledger.parent


def check_failures(rows: list[LedgerRow], max_failure_rate: float, ledger: Path) -> None:
    """Refuses too many failures, and splits that lost all their images.

    Raises:
        CapstanError: says where the ledger is, and what to do.
    """
    failed = sum(row.status != SUCCESS for row in rows)
    if failed > max_failure_rate * len(rows):
        raise CapstanError(
            f"{failed} of {len(rows)} images failed ({failed / len(rows):.1%}), more than download.max_failure_rate "
            f"({max_failure_rate:.1%}) allows. Each with its reason: {ledger}. Mend the source, or raise the limit; "
            "the next run tries transient failures again."
        )
    for split in paths.SPLITS:
        if not any(row.status == SUCCESS and row.split == split for row in rows):
            raise CapstanError(f"every image of the {split} split failed. Each with its reason: {ledger}.")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    params = load_params()
    with stage.running(params):
        download(
            sources=params.data.sources,
            source_settings=params.source_settings,
            download=params.download,
            target=paths.SHARDS,
        )


if __name__ == "__main__":
    stage.run(main)
