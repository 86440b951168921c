"""Every source's table, from small files of the real layouts."""

from __future__ import annotations

import csv
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback import jpeg
from PIL import Image

from captioning.errors import CapstanError
from captioning.params import load_params
from captioning.source_params import (
    CocoSource,
    DrawnSource,
    Flickr30kSource,
    FlickrSource,
    FolderSource,
    SourceSettings,
    UrlTableSource,
)
from captioning.sources import SOURCES, build_table, coco, digits, flickr, folder, shapes, url_table
from captioning.sources.scenes import rng_for, with_article
from captioning.sources.table import Row, check_table, clean_captions, draw_splits, split_name, take_evenly

DRAWN = DrawnSource(num_images=40, image_px=96, captions_per_image=5, seed=3, val_fraction=0.1, test_fraction=0.2)


def archive(name: str) -> dict[str, object]:
    return {"url": f"http://127.0.0.1:1/{name}", "sha256": None}


# The table


@given(st.integers(3, 500), st.floats(0, 0.45), st.floats(0, 0.45), st.integers(0, 5))
def test_drawn_splits_have_the_asked_shares(num, val, test, seed):
    try:
        splits = draw_splits(num, val, test, seed)
    except CapstanError:
        assert round(val * num) + round(test * num) >= num - 2
        return
    counts = Counter(splits)
    assert counts["val"] == (max(1, round(val * num)) if val else 0)
    assert counts["test"] == (max(1, round(test * num)) if test else 0)
    assert sum(counts.values()) == num and counts["train"] > 0
    assert splits == draw_splits(num, val, test, seed)


@given(st.integers(1, 300), st.integers(1, 300))
def test_take_evenly(num_items, num):
    taken = take_evenly(range(num_items), num)
    assert len(taken) == min(num, num_items) and taken == sorted(set(taken))


def test_clean_captions():
    assert clean_captions([" a \n dog\t ", "", "  ", None, float("nan"), "b"]) == ("a dog", "b")


def test_split_names():
    assert [split_name(n, "x") for n in ("restval", "dev", "TEST", "train ")] == ["train", "val", "test", "train"]
    with pytest.raises(CapstanError, match="file.json.*'nan'"):
        split_name("nan", "file.json")


def row(image_id: str, split: str, captions: tuple[str, ...] = ("a",)) -> Row:
    return Row(image_id, "s", split, image_id, image_id, captions)


def test_check_table():
    good = [row("s/1", "train"), row("s/2", "val"), row("s/3", "test")]
    check_table(good)
    with pytest.raises(CapstanError, match="no image at all"):
        check_table([])
    with pytest.raises(CapstanError, match="more than once: s/1"):
        check_table([*good, row("s/1", "train")])
    with pytest.raises(CapstanError, match="test split.*test_fraction"):
        check_table(good[:2])
    with pytest.raises(CapstanError, match="val split"):
        check_table([*good[::2], row("s/4", "val", ())])


def test_registry(tmp_path):
    assert set(SOURCES) == set(SourceSettings.model_fields)
    settings = load_params(Path(__file__).parent.parent / "params.yaml").source_settings
    with pytest.raises(ValueError, match="shapez.*Did you mean 'shapes'.*Choices: coco2014"):
        build_table(["shapez"], settings, tmp_path, 0)
    with pytest.raises(CapstanError, match="lists shapes twice"):
        build_table(["shapes", "shapes"], settings, tmp_path, 0)


# Drawn


@pytest.mark.parametrize("source", [shapes, digits])
def test_drawn_scenes(source, tmp_path):
    name = source.__name__.rpartition(".")[2]
    rows = SOURCES[name](DRAWN, tmp_path / "a", 0)
    again = SOURCES[name](DRAWN, tmp_path / "b", 99)  # the download's seed is another matter
    assert Counter(row.split for row in rows) == {"train": 28, "val": 4, "test": 8}
    for one, two in zip(rows, again, strict=True):
        file, other = (folder / one.url for folder in (tmp_path / "a", tmp_path / "b"))
        assert file.read_bytes() == other.read_bytes()
        assert (one.captions, one.boxes, one.split) == (two.captions, two.boxes, two.split)
        assert Image.open(file).size == (96, 96) and one.location == file.as_uri()
        assert len(set(one.captions)) == 5
        check_boxes(one)
    changed = SOURCES[name](DRAWN.model_copy(update={"seed": 4}), tmp_path / "c", 0)
    assert [row.captions for row in changed] != [row.captions for row in rows]


def check_boxes(row: Row) -> None:
    boxes = json.loads(row.boxes)
    words = [word for box in boxes for word in box["words"]]
    assert 1 <= len(boxes) <= 3 and len(set(words)) == len(words), "nouns of a scene differ"
    for box in boxes:
        left, top, right, bottom = box["box"]
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    for caption in row.captions:
        named = [word for word in caption.replace(",", "").split() if word in (*shapes.NOUNS, *digits.WORDS)]
        assert sorted(named) == sorted(words), f"{caption!r} names all of {words} and nothing else"


def test_shapes_are_where_their_boxes_say(tmp_path):
    for index in range(12):
        scene = shapes.draw_scene(DRAWN, index, "train")
        pixels = np.asarray(scene.image, int)
        caption = " ".join(scene.captions)
        for (noun,), (left, top, right, bottom) in scene.boxes:
            colour = next(c for c in shapes.COLOURS if f"{c} {noun}" in caption)
            x, y = round((left + right) / 2 * 96), round((top + bottom) / 2 * 96)
            assert np.abs(pixels[y, x] - shapes.COLOURS[colour]).max() < 60
            assert right - left >= 0.2


def test_relations_are_true():
    def shape(noun: str, x: float, y: float) -> shapes.Shape:
        return shapes.Shape(noun, "red", "large", 0.3, x, y)

    beside = shapes.describe_pair(shape("circle", 0.2, 0.5), shape("star", 0.8, 0.5), False, "dark")
    assert "a large red circle to the left of a large red star" in beside
    assert "a large red star to the right of a large red circle" in beside
    over = shapes.describe_pair(shape("circle", 0.5, 0.2), shape("star", 0.5, 0.8), True, "dark")
    assert "a large red star below a large red circle" in over
    for index in range(60):
        scene = shapes.draw_scene(DRAWN, index, "train")
        centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for _, b in scene.boxes]
        text = " ".join(scene.captions)
        if len(centres) > 1:
            vertical = any(word in text for word in ("above", "below", "over", "column", "from top"))
            level = any(word in text for word in ("left", "right", "next to", "in a row"))
            assert not (vertical and level)
            steps = np.diff(np.array(centres), axis=0)
            if vertical or level:
                assert (steps[:, 1 if vertical else 0] > 0.15).all()


def test_shape_outlines_fill_their_box():
    for noun in shapes.NOUNS:
        corners = shapes.outline(noun)
        assert np.allclose(corners.min(axis=0), -1, atol=1e-6) and np.allclose(corners.max(axis=0), 1, atol=1e-6)


def test_no_handwriting_is_in_two_splits():
    for digit in range(10):
        used = [set(digits.samples_of(digit, split, 3)) for split in ("train", "val", "test")]
        assert all(used) and not (used[0] & used[1] or used[0] & used[2] or used[1] & used[2])
        assert all(digits.handwriting()[1][number] == digit for part in used for number in part)


def test_wording_helpers():
    assert [with_article(w) for w in ("eight", "one", "orange star", "six")] == [
        "an eight",
        "a one",
        "an orange star",
        "a six",
    ]
    assert rng_for("a", 1).integers(1000) == rng_for("a", 1).integers(1000)
    assert rng_for("a", 1).integers(1 << 60) != rng_for("a", 2).integers(1 << 60)


# Flickr


def flickr8k_root(root: Path, zipped: bool) -> FlickrSource:
    names = [f"{n}_x.jpg" for n in range(6)]
    tokens = "".join(f"{name}#{i}\tA dog number {i} .\n" for name in names[:5] for i in range(5))
    tokens += "".join(f"5_x.jpg.1#{i}\tStray suffix {i} .\n" for i in range(5))
    tokens += "absent.jpg#0\tNot among the splits .\n"
    texts = {
        "Flickr8k.token.txt": tokens,
        "Flickr_8k.trainImages.txt": "\n".join(names[:3] + ["lost.jpg"]) + "\n",
        "Flickr_8k.devImages.txt": names[3] + "\n",
        "Flickr_8k.testImages.txt": "\n".join(names[4:]),
    }
    images = {f"Flicker8k_Dataset/{name}": jpeg(n) for n, name in enumerate(names)}
    root.mkdir()
    if zipped:
        for file, members in (("Flickr8k_text.zip", texts), ("Flickr8k_Dataset.zip", images)):
            with zipfile.ZipFile(root / file, "w") as target:
                for name, data in members.items():
                    target.writestr(name, data)
    else:
        (root / "Flicker8k_Dataset").mkdir()
        for name, text in texts.items():
            (root / name).write_text(text)
        for name, data in images.items():
            (root / name).write_bytes(data)
    return FlickrSource.model_validate(
        {
            "root": root,
            "images": archive("Flickr8k_Dataset.zip"),
            "captions": archive("Flickr8k_text.zip"),
            "max_images": None,
        }
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_flickr8k(zipped, tmp_path):
    rows = flickr.flickr8k_rows(flickr8k_root(tmp_path / "root", zipped), tmp_path / "work", 0)
    assert [row.split for row in rows] == ["train"] * 4 + ["val"] + ["test"] * 2
    assert [row.image_id for row in rows[:4]] == ["flickr8k/0_x", "flickr8k/1_x", "flickr8k/2_x", "flickr8k/lost"]
    assert rows[0].captions == tuple(f"A dog number {i} ." for i in range(5))
    assert rows[-1].captions[0] == "Stray suffix 0 ."
    assert rows[3].captions == ()
    for number in (0, 1, 2):
        assert Path(rows[number].location.removeprefix("file://")).read_bytes() == jpeg(number)
    assert all(row.url == f"{row.image_id.split('/')[1]}.jpg" for row in rows)


def test_flickr8k_part(tmp_path):
    settings = flickr8k_root(tmp_path / "root", True).model_copy(update={"max_images": 3})
    rows = flickr.flickr8k_rows(settings, tmp_path / "work", 0)
    assert len(rows) == 3 and {row.split for row in rows} >= {"train"}


@pytest.mark.parametrize("line", ["no tab", "no_number.jpg\tcaption"])
def test_bad_token_lines_are_named(line):
    with pytest.raises(CapstanError, match="f line 2"):
        flickr.parse_tokens(f"a.jpg#0\tfine\n{line}\n", "f")


def karpathy(name: str, images: list[dict[str, object]]) -> dict[str, str]:
    return {name: json.dumps({"images": images, "dataset": name})}


def test_flickr30k(tmp_path):
    root = tmp_path / "root"
    (root / "flickr30k-images").mkdir(parents=True)
    splits = ["train", "val", "test"]
    for n in range(3):
        (root / "flickr30k-images" / f"{n}.jpg").write_bytes(jpeg(n))
    (root / "results_20130124.token").write_text(
        "".join(f"{n}.jpg#{i}\tText {n}{i}\n" for n in range(3) for i in (0, 1))
    )
    images = [{"filename": f"{n}.jpg", "split": splits[n], "sentences": []} for n in range(3)]
    with zipfile.ZipFile(root / "caption_datasets.zip", "w") as target:
        for name, text in karpathy("dataset_flickr30k.json", images).items():
            target.writestr(name, text)
    settings = Flickr30kSource.model_validate(
        {
            "root": root,
            "images": archive("flickr30k-images.tar.gz"),
            "captions": archive("results_20130124.token"),
            "splits": archive("caption_datasets.zip"),
            "max_images": None,
        }
    )
    rows = flickr.flickr30k_rows(settings, tmp_path / "work", 0)
    assert [(row.split, row.captions) for row in rows] == [
        (split, (f"Text {n}0", f"Text {n}1")) for n, split in enumerate(splits)
    ]
    assert rows[1].location == (root / "flickr30k-images" / "1.jpg").as_uri()


# COCO


def coco_root(root: Path, with_karpathy: bool) -> CocoSource:
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    for part, ids in (("train", [7, 3]), ("val", [11, 10, 13, 12])):
        tree = {
            "images": [
                {"id": n, "file_name": f"COCO_{n}.jpg", "coco_url": f"http://127.0.0.1:1/{part}2014/COCO_{n}.jpg"}
                for n in ids
            ],
            "annotations": [{"image_id": n, "id": 10 * n + i, "caption": f"c{n}{i}"} for n in ids for i in (0, 1)],
        }
        (root / "annotations" / f"captions_{part}2014.json").write_text(json.dumps(tree))
    (root / "val2014" / "COCO_11.jpg").write_bytes(jpeg())
    if with_karpathy:
        splits = {7: "train", 3: "train", 10: "restval", 11: "val", 12: "test"}
        images = [{"cocoid": n, "filename": f"COCO_{n}.jpg", "split": s} for n, s in splits.items()]
        (root / "dataset_coco.json").write_text(karpathy("x", images)["x"])
    return CocoSource.model_validate(
        {
            "root": root,
            "annotations": archive("annotations_trainval2014.zip"),
            "splits": archive("caption_datasets.zip") if with_karpathy else None,
            "max_images": None,
        }
    )


def test_coco_with_karpathys_splits(tmp_path):
    rows = coco.coco2014_rows(coco_root(tmp_path, True), tmp_path / "work", 0)
    found = {row.image_id: row.split for row in rows}
    assert found == {
        "coco2014/3": "train",
        "coco2014/7": "train",
        "coco2014/10": "train",
        "coco2014/11": "val",
        "coco2014/12": "test",
    }
    by_id = {row.image_id: row for row in rows}
    assert by_id["coco2014/11"].location == (tmp_path / "val2014" / "COCO_11.jpg").as_uri()
    assert (
        by_id["coco2014/11"].url
        == by_id["coco2014/11"].url.replace("file:", "")
        == ("http://127.0.0.1:1/val2014/COCO_11.jpg")
    )
    assert by_id["coco2014/3"].location == "http://127.0.0.1:1/train2014/COCO_3.jpg"
    assert by_id["coco2014/12"].captions == ("c120", "c121")


def test_coco_without_split_file(tmp_path):
    rows = coco.coco2014_rows(coco_root(tmp_path, False), tmp_path / "work", 0)
    assert [(row.image_id.split("/")[1], row.split) for row in rows] == [
        ("3", "train"),
        ("7", "train"),
        ("10", "val"),
        ("11", "test"),
        ("12", "val"),
        ("13", "test"),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [{"id": 1}], "annotations": []}'])
def test_bad_coco_file_is_named(text):
    with pytest.raises(CapstanError, match="x.json is not a COCO"):
        coco.load_coco(text, "x.json")


# Your own


def folder_settings(folder: Path, **changes: object) -> FolderSource:
    values = {
        "root": folder,
        "captions_file": "captions.csv",
        "image_column": "image",
        "caption_column": "caption",
        "split_column": None,
        "val_fraction": 0.25,
        "test_fraction": 0.25,
    }
    return FolderSource.model_validate(values | changes)


def write_csv(path: Path, header: list[str], records: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *records])


def test_folder_csv(tmp_path):
    records = [[f"sub/{n}.jpg", text] for n in range(4) for text in (f"Über, {n}", "", f'"two"\nlines {n}')]
    write_csv(tmp_path / "captions.csv", ["image", "caption"], records)
    rows = folder.folder_rows(folder_settings(tmp_path), tmp_path / "work", 5)
    assert [row.image_id for row in rows] == [f"folder/sub/{n}.jpg" for n in range(4)]
    assert rows[2].captions == ("Über, 2", '"two" lines 2')
    assert Counter(row.split for row in rows) == {"train": 2, "val": 1, "test": 1}
    assert rows[0].location == (tmp_path / "sub" / "0.jpg").as_uri() and rows[0].url == "sub/0.jpg"


def test_folder_json_with_lists_and_splits(tmp_path):
    records = [
        {"file": "a.jpg", "texts": ["one", "two"], "part": "train"},
        {"file": "b.jpg", "texts": "three", "part": "validation"},
        {"file": "c.jpg", "texts": [], "part": "test"},
    ]
    (tmp_path / "c.json").write_text(json.dumps(records))
    settings = folder_settings(
        tmp_path, captions_file="c.json", image_column="file", caption_column="texts", split_column="part"
    )
    rows = folder.folder_rows(settings, tmp_path / "work", 0)
    assert [(row.split, row.captions) for row in rows] == [("train", ("one", "two")), ("val", ("three",)), ("test", ())]


def test_folder_mistakes_are_explained(tmp_path):
    def attempt(**changes: object) -> None:
        folder.folder_rows(folder_settings(tmp_path, **changes), tmp_path / "work", 0)

    with pytest.raises(CapstanError, match="captions.csv is missing"):
        attempt()
    with pytest.raises(CapstanError, match="not a folder"):
        attempt(root=tmp_path / "none")
    write_csv(tmp_path / "captions.csv", ["image", "text"], [["a.jpg", "x"]])
    with pytest.raises(CapstanError, match="no column caption; it has image, text"):
        attempt()
    write_csv(tmp_path / "captions.csv", ["image", "caption"], [["../a.jpg", "x"], ["b.jpg", "x"], ["c.jpg", "y"]])
    with pytest.raises(CapstanError, match="not below the folder"):
        attempt()
    write_csv(tmp_path / "captions.csv", ["image", "caption", "split"], [["a", "x", "train"], ["a", "y", "test"]])
    with pytest.raises(CapstanError, match="record 2: a has split 'test' here, 'train' before"):
        attempt(split_column="split")
    write_csv(tmp_path / "captions.csv", ["image", "caption", "split"], [["a", "x", "trial"]])
    with pytest.raises(CapstanError, match="unknown split 'trial'"):
        attempt(split_column="split")
    (tmp_path / "captions.csv").write_bytes(b"image,caption\n\xff\xfe,x\n")
    with pytest.raises(CapstanError, match="damaged"):
        attempt()
    (tmp_path / "captions.xls").write_bytes(b"")
    with pytest.raises(CapstanError, match="unknown ending"):
        attempt(captions_file="captions.xls")
    (tmp_path / "captions.json").write_text('{"a": 1}')
    with pytest.raises(CapstanError, match="list of objects"):
        attempt(captions_file="captions.json")


def url_settings(table: Path, **changes: object) -> UrlTableSource:
    values = {
        "table": table,
        "url_column": "URL",
        "caption_column": "TEXT",
        "id_column": None,
        "split_column": None,
        "val_fraction": 0.25,
        "test_fraction": 0.25,
        "max_images": None,
    }
    return UrlTableSource.model_validate(values | changes)


@pytest.mark.parametrize("captions", ["text", "list"])
def test_url_table_parquet(captions, tmp_path):
    urls = [f"http://127.0.0.1:1/{n % 4} ü.jpg" for n in range(8)]
    texts = [f"t{n}" if captions == "text" else [f"t{n}", f"u{n}"] for n in range(8)]
    pq.write_table(pa.table({"URL": urls, "TEXT": texts, "other": list(range(8))}), tmp_path / "t.parquet")
    rows = url_table.url_table_rows(url_settings(tmp_path / "t.parquet"), tmp_path / "work", 0)
    assert len(rows) == 4
    expected = ("t1", "t5") if captions == "text" else ("t1", "u1", "t5", "u5")
    assert rows[1].captions == expected
    assert rows[1].url == urls[1] and rows[1].location == "http://127.0.0.1:1/1%20%C3%BC.jpg"
    assert len({row.image_id for row in rows}) == 4
    limited = url_table.url_table_rows(url_settings(tmp_path / "t.parquet", max_images=3), tmp_path / "work", 0)
    assert len(limited) == 3


def test_url_table_csv_with_ids_splits_and_missing_addresses(tmp_path):
    records = [["u1", "NA", "a", "train"], ["", "x", "b", "val"], ["u3", "None", "c", "test"]]
    write_csv(tmp_path / "t.csv", ["URL", "TEXT", "id", "split"], records)
    settings = url_settings(tmp_path / "t.csv", id_column="id", split_column="split")
    rows = url_table.url_table_rows(settings, tmp_path / "work", 0)
    assert [row.image_id for row in rows] == ["url_table/a", "url_table/b", "url_table/c"]
    assert rows[0].captions == ("NA",), "a word, not a missing value"
    write_csv(tmp_path / "t.csv", ["URL", "TEXT", "id", "split"], [*records, ["u4", "x", "a", "train"]])
    with pytest.raises(CapstanError, match="more than once: url_table/a"):
        check_table(url_table.url_table_rows(settings, tmp_path / "work", 0))


def test_url_table_that_is_no_parquet(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"nonsense")
    with pytest.raises(CapstanError, match="t.parquet is damaged"):
        url_table.url_table_rows(url_settings(tmp_path / "t.parquet"), tmp_path / "work", 0)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(CapstanError, match="no column URL, TEXT; it has a"):
        url_table.url_table_rows(url_settings(tmp_path / "t.parquet"), tmp_path / "work", 0)
