"""Archives: transfer with resume, checksums, and members that must not be trusted."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import loopback
import pytest

from captioning import archives, transfer
from captioning.errors import CapstanError
from captioning.source_params import Archive

DATA = bytes(range(256)) * 40


@pytest.fixture
def server():
    with loopback.serve() as server:
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.01)
    monkeypatch.setattr(transfer, "TIMEOUT_S", 3.0)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))


def sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # of 1980: the same bytes whenever it is made
    return path


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# Transfer


def test_a_broken_transfer_goes_on_where_it_stopped(server, tmp_path):
    url = server.add("/a.zip", loopback.ranged(DATA, '"v1"', cut_first_at=6000))
    target = transfer.download(url, tmp_path / "d" / "a.zip", sha256(DATA))
    assert target.read_bytes() == DATA
    assert [headers.get("Range") for headers in server.headers_seen["/a.zip"]] == [None, "bytes=6000-"]
    assert sorted(p.name for p in target.parent.iterdir()) == ["a.zip", "a.zip.sha256"]


def test_a_killed_run_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "NUM_ATTEMPTS", 1)
    target = tmp_path / "a.zip"
    answer = loopback.ranged(DATA, '"v1"', cut_first_at=5000)
    url = server.add("/a.zip", answer)
    with pytest.raises(CapstanError, match="run again to go on at byte 5,000"):
        # Bytes arrived, so another attempt is made: that one finds the server gone.
        server.answers["/a.zip"] = loopback.first(answer, loopback.status(503))
        transfer.download(url, target, None)
    server.answers["/a.zip"] = answer
    assert transfer.download(url, target, None).read_bytes() == DATA
    assert server.headers_seen["/a.zip"][-1]["Range"] == "bytes=5000-"


def test_a_file_that_changed_meanwhile_is_fetched_from_its_beginning(server, tmp_path):
    new = DATA[::-1]
    old_answer, new_answer = loopback.ranged(DATA, '"v1"', 6000), loopback.ranged(new, '"v2"')
    url = server.add("/a.zip", loopback.first(old_answer, new_answer))
    assert transfer.download(url, tmp_path / "a.zip", None).read_bytes() == new


def test_a_server_without_range_sends_all_again(server, tmp_path):
    url = server.add("/a.zip", loopback.first(loopback.broken_off(DATA), loopback.body(DATA)))
    assert transfer.download(url, tmp_path / "a.zip", None).read_bytes() == DATA


def test_a_finished_file_is_checked_and_not_fetched_again(server, tmp_path, capsys):
    url = server.add("/a.zip", loopback.body(DATA))
    target = transfer.download(url, tmp_path / "a.zip", None)
    assert sha256(DATA) in capsys.readouterr().out  # so that it can be pinned
    transfer.download(url, target, sha256(DATA).upper())
    assert server.counts["/a.zip"] == 1
    target.write_bytes(DATA[:-1] + b"!")
    assert transfer.download(url, target, None).read_bytes() == DATA
    assert server.counts["/a.zip"] == 2
    assert (tmp_path / "a.zip.corrupt").exists()


def test_a_wrong_digest_is_an_error_with_both_digests(server, tmp_path):
    url = server.add("/a.zip", loopback.body(DATA))
    with pytest.raises(CapstanError) as caught:
        transfer.download(url, tmp_path / "a.zip", "0" * 64)
    assert sha256(DATA) in str(caught.value) and "0" * 64 in str(caught.value)
    assert not (tmp_path / "a.zip").exists()
    assert (tmp_path / "a.zip.corrupt").read_bytes() == DATA


def test_transient_answers_are_retried_and_permanent_ones_not(server, tmp_path):
    url = server.add("/a", loopback.first(loopback.status(503), loopback.reset, loopback.body(DATA)))
    assert transfer.download(url, tmp_path / "a", None).read_bytes() == DATA
    with pytest.raises(CapstanError, match="HTTP 404"):
        transfer.download(server.url("/none"), tmp_path / "b", None)
    assert server.counts["/none"] == 1
    with pytest.raises(CapstanError, match="could not be fetched"):
        transfer.download(server.add("/503", loopback.status(503)), tmp_path / "c", None)
    with pytest.raises(CapstanError, match="not an address"):
        transfer.download("nonsense", tmp_path / "d", None)


# Where the archive is


def test_locate(server, tmp_path):
    archive = Archive(url=server.add("/x/a.zip?y=1", loopback.body(DATA)), sha256=None)
    assert archives.locate(archive, None).read_bytes() == DATA
    root = tmp_path / "root"
    with pytest.raises(CapstanError, match="not a folder"):
        archives.locate(archive, root)
    root.mkdir()
    assert archives.locate(archive, root) == root  # unpacked files, perhaps
    (root / "a.zip").write_bytes(DATA)
    assert archives.locate(archive, root) == root / "a.zip"
    with pytest.raises(CapstanError, match="pins"):
        archives.locate(Archive(url=archive.url, sha256="1" * 64), root)
    assert (root / "a.zip").exists(), "the user's own file is left alone"


# What is in it


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "C:\\x.jpg", "..\\x.jpg"])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_entries_that_climb_out_are_refused(name, make, tmp_path):
    path = make(tmp_path / ("a.zip" if make is make_zip else "a.tar"), {"fine.jpg": b"1", name: b"2"})
    with pytest.raises(CapstanError, match="outside"):
        archives.extract(path, {"fine.jpg", "x.jpg"}, tmp_path / "out" / "images")
    assert not (tmp_path / "out" / "images").exists() and not (tmp_path / "out" / "x.jpg").exists()


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("x.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("x.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    for name in ("a.tar", "a.zip"):
        with pytest.raises(CapstanError, match="is a link"):
            archives.extract(tmp_path / name, {"x.jpg"}, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_only_wanted_members_are_extracted(name, tmp_path):
    members = {"photos/1.jpg": b"one", "photos/2.jpg": b"two", "run.sh": b"#!"}
    make_zip(tmp_path / name, members) if name == "a.zip" else make_tar(
        tmp_path / name, members, "w:gz" if name.endswith("gz") else "w"
    )
    assert archives.extract(tmp_path / name, {"2.jpg", "3.jpg"}, tmp_path / "out") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {"2.jpg": b"two"}
    assert archives.read_text(tmp_path / name, "run.sh") == "#!"
    with pytest.raises(CapstanError, match="holds no other.txt"):
        archives.read_text(tmp_path / name, "other.txt")
    with pytest.raises(CapstanError, match="a wrong file"):
        archives.extract(tmp_path / name, {"9.jpg"}, tmp_path / "none")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_archive_is_named(name, share, tmp_path):
    members = {f"{i}.jpg": os.urandom(3000) for i in range(10)}
    path = tmp_path / name
    make_zip(path, members) if name == "a.zip" else make_tar(path, members, "w:gz" if name.endswith("gz") else "w")
    # A tar is padded to 10 KiB: cut where the members are.
    os.truncate(path, int(share * (path.stat().st_size if name != "a.tar" else 30_000)))
    with pytest.raises(CapstanError, match="a.(zip|tar).*is damaged"):
        archives.extract(path, set(members), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tar_cut_between_members_is_damaged(tmp_path):
    members = {f"{i}.jpg": bytes([i]) * 512 for i in range(40)}
    path = make_tar(tmp_path / "a.tar", members)
    os.truncate(path, 20 * 1024)
    with pytest.raises(CapstanError, match="damaged"):
        archives.extract(path, set(members), tmp_path / "out")


def test_a_flipped_bit_in_a_zip_is_found(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"1.jpg": b"some bytes of an image"})
    data = bytearray(path.read_bytes())
    data[data.index(b"some")] ^= 1
    path.write_bytes(data)
    with pytest.raises(CapstanError, match="CRC"):
        archives.extract(path, {"1.jpg"}, tmp_path / "out")


def test_sizes_are_limited(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", {"1.jpg": bytes(5000)})
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 4999)
    with pytest.raises(CapstanError, match="5,000 bytes"):
        archives.extract(path, {"1.jpg"}, tmp_path / "out")
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 5000)
    monkeypatch.setattr(archives, "DISK_RESERVE_BYTES", 1 << 60)
    with pytest.raises(CapstanError, match="free"):
        archives.extract(path, {"1.jpg"}, tmp_path / "out")


def test_image_folder_takes_unpacked_files_or_the_archive(tmp_path):
    archive = Archive(url="http://127.0.0.1:1/images.zip", sha256=None)
    root, work = tmp_path / "root", tmp_path / "work"
    (root / "any" / "name").mkdir(parents=True)
    with pytest.raises(CapstanError, match="images.zip"):
        archives.image_folder(archive, root, {"1.jpg"}, work)
    (root / "any" / "name" / "1.jpg").write_bytes(b"1")
    assert archives.image_folder(archive, root, {"1.jpg"}, work) == root / "any" / "name"
    make_zip(root / "images.zip", {"deep/1.jpg": b"1"})
    folder = archives.image_folder(archive, root, {"1.jpg"}, work)
    assert (folder / "1.jpg").read_bytes() == b"1" and folder.is_relative_to(work)
    assert archives.image_folder(archive, root, {"1.jpg"}, work) == folder


# Recovery


def extracted(tmp_path: Path) -> Path:
    images = Archive(url="http://127.0.0.1:9/images.zip", sha256=None)
    make_zip(tmp_path / "images.zip", {f"a/{n}.jpg": DATA[n:] for n in range(3)})
    return archives.image_folder(images, tmp_path, {"0.jpg", "1.jpg", "2.jpg"}, tmp_path / "work")


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "extra", "note"])
def test_extracted_images_that_changed_are_set_aside_and_extracted_anew(damage, tmp_path, capsys, monkeypatch):
    folder = extracted(tmp_path)
    assert extracted(tmp_path) == folder and "set aside" not in capsys.readouterr().out
    image, note = folder / "1.jpg", folder.with_name(f"{folder.name}.jsonl")
    if damage == "bit":
        image.write_bytes(b"\x03" + image.read_bytes()[1:])
    elif damage == "cut":
        os.truncate(image, 10)
    elif damage == "missing":
        image.unlink()
    elif damage == "extra":
        (folder / "9.jpg").write_bytes(b"")
    else:
        os.truncate(note, 30)
    assert extracted(tmp_path) == folder and "set aside" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {f"{n}.jpg": DATA[n:] for n in range(3)}


def test_two_processes_fetch_an_archive_once(server, tmp_path):
    """The second waits for the first, which is in the middle of its transfer, and takes what it fetched."""
    begun, go_on = threading.Event(), threading.Event()

    def answer(handler: loopback.Handler) -> None:
        begun.set()
        go_on.wait(30)
        loopback.body(DATA)(handler)

    url = server.add("/a.zip", answer)
    program = "import sys; from captioning.archives import fetch_once; print(fetch_once(sys.argv[1], 'a.zip', None))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, url]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    first = start()
    assert begun.wait(30)
    second = start()
    assert second.stdout is not None
    assert "waiting for process" in second.stdout.readline()
    go_on.set()
    paths = [process.communicate(timeout=60)[0].split()[-1] for process in (first, second)]
    assert paths[0] == paths[1] and Path(paths[0]).read_bytes() == DATA
    assert server.counts["/a.zip"] == 1


@pytest.mark.parametrize("moment", ["received", "checked"])
def test_a_whole_file_is_not_fetched_again_after_a_kill_before_its_renaming(moment, server, tmp_path, monkeypatch):
    whole = loopback.ranged(DATA, '"v1"')

    def answer(handler: loopback.Handler) -> None:
        if handler.headers.get("Range") != f"bytes={len(DATA)}-":
            return whole(handler)
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(DATA)}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    url = server.add("/a.zip", answer)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer.storage, "sha256_file" if moment == "received" else "move", killed)
        with pytest.raises(KeyboardInterrupt):
            transfer.download(url, tmp_path / "d" / "a.zip", sha256(DATA))
    target = transfer.download(url, tmp_path / "d" / "a.zip", sha256(DATA))
    assert target.read_bytes() == DATA
    assert [headers.get("Range") for headers in server.headers_seen["/a.zip"]] == (
        [None, f"bytes={len(DATA)}-"] if moment == "received" else [None]
    )
    assert sorted(p.name for p in target.parent.iterdir()) == ["a.zip", "a.zip.sha256"]
