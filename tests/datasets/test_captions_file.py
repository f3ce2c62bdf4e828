import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.annotations.captions import read_captions_file
from tests.datasets.helpers import ROWS, coco, write_csv, write_json

KARPATHY = {
    "images": [
        {"filename": "a.jpg", "filepath": "val2014", "split": "restval", "cocoid": 7,
         "sentences": [{"raw": "One."}, {"raw": "Two."}]},
        {"filename": "b.jpg", "split": "test", "imgid": 8, "sentences": [{"raw": "Three."}]},
    ]
}


def pairs(found):
    return [(row.image, row.caption) for row in found.rows]


def test_every_format_gives_the_same_rows(tmp_path):
    dicts = [{"image": image, "caption": caption} for image, caption in ROWS]
    files = {
        "CSV": write_csv(tmp_path / "captions.txt"),
        "TSV": tmp_path / "captions.tsv",
        "COCO JSON": write_json(tmp_path / "coco.json", coco()),
        "LAVIS JSON": write_json(tmp_path / "lavis.json", dicts),
        "JSONL": tmp_path / "captions.jsonl",
    }
    files["TSV"].write_text("image\tcaption\n" + "".join(f"{image}\t{caption}\n" for image, caption in ROWS))
    files["JSONL"].write_text("\n".join(map(json.dumps, dicts)))
    for kind, path in files.items():
        found = read_captions_file(path)
        assert (found.format, pairs(found), found.problems) == (kind, ROWS, [])


def test_one_line_of_json_is_a_row(tmp_path):
    found = read_captions_file(write_json(tmp_path / "one.jsonl", {"image": "a.jpg", "caption": ["x", "y"]}))
    assert pairs(found) == [("a.jpg", "x"), ("a.jpg", "y")]


def test_karpathy_keeps_ids_folders_and_splits(tmp_path):
    found = read_captions_file(write_json(tmp_path / "k.json", KARPATHY))
    assert [tuple(row)[:4] for row in found.rows] == [
        ("val2014/a.jpg", "One.", 7, "restval"), ("val2014/a.jpg", "Two.", 7, "restval"),
        ("b.jpg", "Three.", 8, "test"),
    ]


# the fields that the files of the paper's caption benchmarks have
FLICKR30K = {"dataset": "flickr30k", "images": [
    {"sentids": [0, 1], "imgid": 0, "split": "test", "filename": "1000092795.jpg", "sentences": [
        {"tokens": ["two"], "raw": "Two young guys.", "imgid": 0, "sentid": 0},
        {"tokens": ["men"], "raw": "Men outside.", "imgid": 0, "sentid": 1}]},
]}  # fmt: skip
NOCAPS = {
    "licenses": [], "info": {},
    "images": [{"license": 0, "open_images_id": "0013ea", "id": 0, "width": 1024, "height": 732, "domain": "in-domain",
                "coco_url": "https://example.org/0013ea.jpg", "file_name": "0013ea.jpg", "date_captured": ""}],
    "annotations": [{"image_id": 0, "id": 0, "caption": "A baby."}, {"image_id": 0, "id": 1, "caption": "A child."}],
}  # fmt: skip
LAVIS_COCO = [{"image": "val2014/COCO_val2014_000000184613.jpg", "caption": ["A child.", "A boy."]}]
LAVIS_NOCAPS = [{"image": "val/0013ea.jpg", "img_id": 0, "caption": ["A baby."]}]


@pytest.mark.parametrize(
    "content, expected",
    [
        (FLICKR30K, [("1000092795.jpg", "Two young guys.", 0, "test"), ("1000092795.jpg", "Men outside.", 0, "test")]),
        (NOCAPS, [("0013ea.jpg", "A baby.", 0, None), ("0013ea.jpg", "A child.", 0, None)]),
        (LAVIS_COCO, [(LAVIS_COCO[0]["image"], text, None, None) for text in ("A child.", "A boy.")]),
        (LAVIS_NOCAPS, [("val/0013ea.jpg", "A baby.", None, None)]),
    ],
    ids=["dataset_flickr30k", "nocaps_val_4500_captions", "coco_karpathy_val", "LAVIS nocaps"],
)
def test_files_of_the_benchmarks(tmp_path, content, expected):
    found = read_captions_file(write_json(tmp_path / "file.json", content))
    assert [tuple(row)[:4] for row in found.rows] == expected and not found.problems


def test_columns_may_have_other_names(tmp_path):
    path = write_csv(tmp_path / "c.csv", header="filepath,title")
    with pytest.raises(DataError, match=r"csv has no column 'image'.*'filepath', 'title'.*columns\.image="):
        read_captions_file(path)
    with pytest.raises(DataError, match=r"columns\.caption=NAME"):
        read_captions_file(path, {"image": "filepath"})
    assert pairs(read_captions_file(path, {"image": "filepath", "caption": "title"})) == ROWS
    with pytest.raises(DataError, match=r"columns\.text is not known"):
        read_captions_file(path, {"text": "title"})


def test_bad_rows_are_named_and_the_good_ones_kept(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('image,caption\na.jpg,fine\nb.jpg,\n,lost\nc.jpg,one, two\nd.jpg," . "\n')
    found = read_captions_file(path)
    assert pairs(found) == [("a.jpg", "fine")]
    assert len(found.problems) == 4
    assert any("line 5: 3 fields" in problem for problem in found.problems)
    assert any("no caption for b.jpg" in problem for problem in found.problems)


def test_coco_counts_orphans_and_bare_images(tmp_path):
    content = coco()
    content["annotations"] = content["annotations"][2:] + [{"image_id": 999, "caption": "who"}]
    found = read_captions_file(write_json(tmp_path / "coco.json", content))
    assert found.problems == ["annotation 11: the image id 999 is not among the images"]
    assert found.notes == ["1 images have no caption and are not used"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty"),
        ("<!DOCTYPE html><html>404</html>", "looks like HTML"),
        ('{"images": [', "not valid JSON"),
        ('{"image": "a", "caption": "b"}\n{"image"', "line 2 is not valid JSON"),
        ('{"info": 1, "licenses": 2}\n', "expected COCO captions"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"bbox": []}]}', r"captions_\*"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1}], "annotations": []}', "to two images"),
        ("image,caption\x00\xff", "has no column 'caption'"),
        ('{"images": [7, {"id": 1}], "annotations": [{"caption": "a"}]}', "expected COCO"),
        ('{"images": [{"id": 1}, 7], "annotations": [{"caption": "a"}]}', "image 2 is not an object but 7"),
        ('{"images": [{"id": 1}], "annotations": [{"caption": "a"}, null]}', "annotation 2 is not an object but None"),
        ('image,caption\na.jpg,a cat\np.jpg,"a dog\n' + "b.jpg,a bird\n" * 1000, "line 3 to .* quote marks"),
        ('image,caption\np.jpg,"a dog\n' + "b.jpg,a bird\n" * 20 + 'c.jpg,"a bar"\n', "line 2.* not closed"),
        ('image,caption\na.jpg,a cat\np.jpg,"a' + "\nb.jpg,a bird" * 20 + '"\n', "line 3: a quote opens a row"),
    ],
)
def test_a_file_that_is_no_captions_file(tmp_path, text, words):
    path = tmp_path / "captions"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        read_captions_file(path)
    assert str(path) in str(error.value)


def test_a_caption_may_span_lines_and_a_table_may_begin_with_empty_ones(tmp_path):
    (tmp_path / "c.csv").write_text('\n\nimage,caption\na.jpg,"two\nlines"\nb.jpg,"a ""big"" dog"\n')
    found = read_captions_file(tmp_path / "c.csv")
    assert [row.caption for row in found.rows] == ["two\nlines", 'a "big" dog'] and not found.problems


SWALLOWED = [
    # (header, rows, first and last line of the bad row)
    ("image,caption", 'a.jpg,"a dog\nb.jpg,a cat"\n', (3, 4)),
    ("image,caption", 'a.jpg,"a dog\nb.JPG,a cat\n\nc.jpg,a bird"\n', (3, 6)),
    ("caption,image", '"a dog,a.jpg\na cat",b.jpg\n', (3, 4)),
    ("image,caption,split", 'a.jpg,"a dog,train\nb.jpg,a cat",train\n', (3, 4)),
    ("image;caption", 'a.jpg;"a dog\nb.jpg;a cat"\n', (3, 4)),
    ("image,caption", 'video1,"a dog\nvideo2,a cat"\n', (3, 4)),
    ("image,caption", '17,"a dog\n18,a cat"\n', (3, 4)),
]


@pytest.mark.parametrize("header, rows, lines", SWALLOWED)
def test_rows_that_a_quote_took_into_a_caption_are_a_bad_row(tmp_path, header, rows, lines):
    """They were one caption, without a word."""
    good = {"image": "z.jpg", "caption": "a fox", "split": "val"}
    mark = ";" if ";" in header else ","
    row = mark.join(good[name] for name in header.split(mark))
    (tmp_path / "c.csv").write_text(f"{header}\n{row}\n{rows}{row}\n")
    found = read_captions_file(tmp_path / "c.csv")
    assert pairs(found) == [("z.jpg", "a fox")] * 2
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"lines {lines[0]} to {lines[1]}: a quote takes what looks like another row")


@pytest.mark.parametrize(
    "header, row, caption",
    [
        ("image,caption", 'a.jpg,"A dog runs.\nIt is fast, and brown."', "A dog runs.\nIt is fast, and brown."),
        ("image,caption", 'a.jpg,"one, two\nthree, four"', "one, two\nthree, four"),
        ("caption,image", '"a dog\nand a cat",a.jpg', "a dog\nand a cat"),
        ("image,caption", 'video1,"A man runs.\nHe stops, then sits."', "A man runs.\nHe stops, then sits."),
        ("image,caption,split", 'a.jpg,"a dog,\na cat, and\na fox",train', "a dog,\na cat, and\na fox"),
    ],
)
def test_captions_of_several_lines_with_commas_stay_whole(tmp_path, header, row, caption):
    (tmp_path / "c.csv").write_text(f"{header}\n{row}\n")
    found = read_captions_file(tmp_path / "c.csv")
    assert [row.caption for row in found.rows] == [caption] and not found.problems


@pytest.mark.parametrize("text", ["[" * 100_000, '{"image": "a", "caption": "b"}\n' + '{"a":' * 100_000])
def test_json_that_is_nested_without_end_is_one_message(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match="c.json.* nested too deeply"):
        read_captions_file(tmp_path / "c.json")


def test_half_a_surrogate_pair_is_a_problem_of_its_row(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"image": "a", "caption": "a \\ud83d b"}\n{"image": "b", "caption": "c"}')
    found = read_captions_file(tmp_path / "c.jsonl")
    assert [row.image for row in found.rows] == ["b"] and "line 1: half of a surrogate pair" in found.problems[0]


def test_missing_or_binary_file(tmp_path):
    with pytest.raises(DataError, match="there is no captions file"):
        read_captions_file(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00image")
    with pytest.raises(DataError, match="not UTF-8"):
        read_captions_file(tmp_path / "b.csv")


captions = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(
    lambda text: any(mark.isalnum() for mark in text)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(captions, min_size=1, max_size=5))
def test_any_caption_survives_csv_and_jsonl(tmp_path, texts):
    rows = [(f"{n}.jpg", text) for n, text in enumerate(texts)]
    with open(tmp_path / "c.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    lines = [json.dumps({"image": image, "caption": text}, ensure_ascii=False) for image, text in rows]
    (tmp_path / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    expected = [(image, text.strip()) for image, text in rows]
    assert pairs(read_captions_file(tmp_path / "c.csv")) == expected
    assert pairs(read_captions_file(tmp_path / "c.jsonl")) == expected


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"id": [], "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]},
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": {}, "caption": "a dog"}]},
        {"images": [{"filename": "a.jpg", "sentences": [{"raw": "a dog"}]}, 5]},
        {"images": [{"filename": "a.jpg", "sentences": ["a dog"]}]},
        {"images": [{"filename": "a.jpg", "sentences": 5}]},
    ],
)
def test_a_benchmarks_file_of_another_layout_is_one_line(tmp_path, content):
    with pytest.raises(DataError, match="c.json is broken: it is not laid out as (COCO|Karpathy) JSON is"):
        read_captions_file(write_json(tmp_path / "c.json", content))


def test_numbers_of_thousands_of_digits_are_one_message(tmp_path):
    for text in ('[{"image": %s}]', '{"image": 1}\n{"image": %s}'):
        path = tmp_path / "c.json"
        path.write_text(text % ("1" * 5000))
        with pytest.raises(DataError, match="c.json .*not valid JSON: Exceeds the limit"):
            read_captions_file(path)


def test_thousands_of_columns_are_not_all_listed(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({f"{n}.jpg": "a dog" for n in range(1000)}))
    with pytest.raises(DataError, match="no column 'image'; its columns are '0.jpg', .*'19.jpg' and 980 more") as error:
        read_captions_file(path)
    assert len(str(error.value)) < 800


def test_a_column_that_is_there_twice_is_refused_where_it_is_needed(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("image,caption,note,note\na.jpg,a dog,1,2\n")
    assert read_captions_file(path).rows[0].caption == "a dog"
    path.write_text("image,caption,caption\na.jpg,a dog,a cat\n")
    with pytest.raises(DataError, match="c.csv has 2 columns 'caption': which one holds the caption is not known"):
        read_captions_file(path)
