"""Canonical tars, their scan, and the ledger."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loopback import jpeg

from captioning.errors import CapstanError, DamagedError
from captioning.shards import (
    TARS,
    LedgerRow,
    ShardWriter,
    decode_image,
    digest_bytes,
    iterate_shard,
    read_ledger,
    read_ledger_metadata,
    read_ledger_part,
    scan_shard,
    summarise,
    verify_shards,
    write_ledger,
)
from captioning.storage import digest_file


def row(number: int, data: bytes | None = b"", status: str = "success", reason: str = "") -> LedgerRow:
    good = status == "success"
    return LedgerRow(
        image_id=f"shapes/{number}",
        source="shapes",
        split="train",
        url=f"{number}.png",
        status=status,
        reason=reason,
        shard="00000" if good else None,
        key=f"{number:08d}" if good else None,
        width=40 if good else None,
        height=30 if good else None,
        digest=digest_bytes(data or b"") if good else None,
        captions=["a ü", "b"],
        boxes="[]",
    )


def make_shard(path: Path, num: int = 4) -> list[LedgerRow]:
    rows = []
    with ShardWriter(path) as writer:
        for number in range(num):
            rows.append(row(number, jpeg(number)))
            writer.add(f"{number:08d}", jpeg(number), {"image_id": f"shapes/{number}", "width": 40})
    return rows


def test_a_shard_reads_back_in_order_and_is_canonical(tmp_path):
    rows = make_shard(tmp_path / "a.tar")
    make_shard(tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    samples = list(iterate_shard(tmp_path / "a.tar"))
    assert [key for key, _, _ in samples] == [row.key for row in rows]
    assert samples[2][1] == jpeg(2) and samples[2][2]["image_id"] == "shapes/2"
    assert decode_image(samples[0][1], 10_000).shape == (30, 40, 3)
    with tarfile.open(tmp_path / "a.tar") as tar:
        infos = tar.getmembers()
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o644)}
    assert [i.name for i in infos[:2]] == ["00000000.jpg", "00000000.json"]


def test_webdataset_reads_it(tmp_path):
    import webdataset

    make_shard(tmp_path / "a.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{n:08d}" for n in range(4)]
    assert samples[1]["jpg"] == jpeg(1)


def test_keys_must_come_in_order(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("00000002", b"", {})
        with pytest.raises(AssertionError, match="in order"):
            writer.add("00000001", b"", {})


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path):
    make_shard(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        boundaries = [info.offset for info in tar.getmembers()]
    for size in [0, 1, len(data) // 2, len(data) - 1, *boundaries]:
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(CapstanError, match="dvc repro download"):
            list(iterate_shard(tmp_path / "cut.tar"))
    with pytest.raises(CapstanError, match="missing or damaged"):
        list(iterate_shard(tmp_path / "absent.tar"))


@pytest.mark.parametrize("names", [["1.jpg"], ["1.json"], ["1.jpg", "2.json"], ["1.jpg", "1.jpg"], ["1.jpg", "1.txt"]])
def test_members_must_pair(names, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(CapstanError):
        list(iterate_shard(tmp_path / "a.tar"))


def test_scan_compares_with_the_ledger(tmp_path):
    path = tmp_path / "a.tar"
    rows = make_shard(path)
    failed = row(9, status="permanent", reason="HTTP 404")
    scan_shard(path, [*rows, failed])
    with pytest.raises(CapstanError, match="does not list"):
        scan_shard(path, rows[:-1])
    with pytest.raises(CapstanError, match="holds 4 samples, its ledger lists 5"):
        scan_shard(path, [*rows, row(4)])
    with pytest.raises(CapstanError, match="its ledger says"):
        scan_shard(path, [row(0, b"other"), *rows[1:]])


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_sample_is_found(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    rows = make_shard(folder / "a.tar", 2)
    with tarfile.open(folder / "a.tar") as tar:
        spans = [(i.offset_data, i.size) for i in tar.getmembers() if i.name.endswith("jpg")]
    offset, size = spans[position % 2]
    data = bytearray((folder / "a.tar").read_bytes())
    data[offset + position % size] ^= 1 << bit
    (folder / "a.tar").write_bytes(data)
    with pytest.raises(CapstanError):
        scan_shard(folder / "a.tar", rows)


def test_ledger_round_trip(tmp_path):
    rows = [row(0), row(1, status="transient", reason="timeout")]
    write_ledger(tmp_path / "ledger.parquet", rows, {"table_digest": "x"})
    assert read_ledger(tmp_path / "ledger.parquet") == rows
    assert read_ledger_part(tmp_path / "ledger.parquet")[1]["table_digest"] == "x"
    assert read_ledger_metadata(tmp_path / "ledger.parquet")["table_digest"] == "x"
    with pytest.raises(CapstanError, match="dvc repro download"):
        read_ledger(tmp_path / "absent.parquet")


@pytest.fixture(scope="module")
def ledger_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("ledger") / "ledger.parquet"
    write_ledger(path, [row(n) for n in range(5)], {"tar_digests": '{"00000": "x"}'})
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@example(position=1558, bit=4)  # makes a column of text one of bytes
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_ledger_changes_nothing_that_is_read_or_is_found(
    tmp_path_factory, ledger_bytes, position, bit
):
    path = tmp_path_factory.mktemp("flip") / "ledger.parquet"
    path.write_bytes(ledger_bytes)
    before = read_ledger_part(path)
    data = bytearray(ledger_bytes)
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        assert read_ledger_part(path) == before  # parquet has bytes that nobody reads
    except DamagedError:
        with pytest.raises(DamagedError, match="`dvc repro` again"):
            read_ledger(path)
        assert not path.exists() and path.with_name("ledger.parquet.corrupt").exists()


def test_a_ledger_cut_anywhere_is_damaged(tmp_path, ledger_bytes):
    path = tmp_path / "ledger.parquet"
    for size in (0, 1, len(ledger_bytes) // 2, len(ledger_bytes) - 1):
        path.write_bytes(ledger_bytes[:size])
        with pytest.raises(DamagedError, match=r"ledger.parquet has other bytes"):
            read_ledger(path)


def test_one_without_digests_is_damaged(tmp_path):
    pq.write_table(pq.read_table(written(tmp_path)).replace_schema_metadata({}), tmp_path / "ledger.parquet")
    with pytest.raises(DamagedError):
        read_ledger(tmp_path / "ledger.parquet")


def written(folder: Path) -> Path:
    """A shard and the ledger that belongs to it."""
    rows = make_shard(folder / "00000.tar")
    write_ledger(folder / "ledger.parquet", rows, {TARS: json.dumps({"00000": digest_file(folder / "00000.tar")})})
    return folder / "ledger.parquet"


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_shard_is_found_before_it_is_read(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    written(folder)
    verify_shards(folder, ["00000"])
    path = folder / "00000.tar"
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    path.chmod(0o444)
    with pytest.raises(DamagedError, match=r"00000.tar has other bytes than were written .*`dvc repro` again"):
        verify_shards(folder, ["00000"])
    aside = folder / "00000.tar.corrupt"
    assert not path.exists() and aside.read_bytes() == data
    assert aside.stat().st_mode & 0o222, "DVC would take it for whole"


def test_shards_that_are_missing_unknown_or_under_another_name(tmp_path):
    written(tmp_path)
    with pytest.raises(CapstanError, match=r"00007.tar is missing.*dvc repro download"):
        verify_shards(tmp_path, ["00007"])
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00000.tar").read_bytes())
    verify_shards(tmp_path, ["00000"])
    with pytest.raises(DamagedError, match="00001.tar"):
        verify_shards(tmp_path, ["00000", "00001"])
    os.truncate(tmp_path / "ledger.parquet", 100)
    with pytest.raises(DamagedError, match="ledger.parquet has other bytes"):
        verify_shards(tmp_path, [])


def test_totals_by_reason():
    failures = [row(n, status="permanent", reason="HTTP 404") for n in (1, 2)]
    lines = summarise([row(0), *failures, row(3, status="transient", reason="timeout")])
    assert lines == [
        "shapes: 1 of 4 images stored (train 1, val 0, test 0)",
        "  2 failed: HTTP 404 (permanent)",
        "  1 failed: timeout (transient)",
        "total: 1 stored, 3 failed (75.00 %)",
    ]
