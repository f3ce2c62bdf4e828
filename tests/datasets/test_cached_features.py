"""The files of stored tokens: what is written is what is read, and files from elsewhere are checked."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from lavis_evlgen.datasets import DataError
from lavis_evlgen.datasets.cached_features import (
    CachedFeatures,
    FeatureStore,
    FeatureWriter,
    file_record,
    has_changed,
)
from lavis_evlgen.media.errors import UnreadableImage

NAMES, VIEWS, SIZE = ["a.jpg", "b.jpg", "c.jpg"], 2, [5, 4]


def tokens_of(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(VIEWS, *SIZE, generator=torch.Generator().manual_seed(n)).to(dtype)


def filled(folder, dtype=torch.bfloat16) -> FeatureStore:
    """Two ranks store two pictures; the third cannot be read."""
    store = FeatureStore(folder, "photos-train")
    store.create({"tokens": SIZE, "dtype": str(dtype).removeprefix("torch."), "views": VIEWS}, NAMES, {})
    for rank, own in enumerate(([0, 2], [1])):
        writer = FeatureWriter(store, store.index(), rank)
        for n in own:
            if n == 2:
                writer.add(NAMES[n], {"path": "/c.jpg", "reason": "broken"}, None)
            else:
                writer.add(NAMES[n], {"size": n}, tokens_of(n, dtype))
        writer.close()
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_come_back_bit_for_bit(tmp_path, dtype):
    store = filled(tmp_path, dtype)
    store.merge()
    assert list(tmp_path.glob("*.jsonl")) == [] and store.index()["records"]["b.jpg"] == {"size": 1}
    reader = CachedFeatures(store, store.index())
    for features in (reader, pickle.loads(pickle.dumps(reader))):
        for n in (0, 1):
            for epoch in range(4):
                found = features.tokens(NAMES[n], epoch)
                assert found.dtype == dtype and torch.equal(found, tokens_of(n, dtype)[epoch % VIEWS])
        with pytest.raises(UnreadableImage, match="cannot read the image /c.jpg: broken"):
            features.tokens("c.jpg", 0)


def test_a_reader_is_sent_to_a_worker_without_the_tokens(tmp_path):
    store = filled(tmp_path)
    features = CachedFeatures(store, store.index())
    features.tokens("a.jpg", 0)
    size = len(pickle.dumps(features))
    assert features._map is not None and len(pickle.dumps(pickle.loads(pickle.dumps(features)))) == size < 1000


def test_records_follow_their_tokens(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path, "photos-train")
    store.create({"tokens": SIZE, "dtype": "float32", "views": VIEWS}, NAMES, {})
    writer = FeatureWriter(store, store.index(), 0)
    writer.add("a.jpg", {}, tokens_of(0, torch.float32))
    assert store.index()["records"] == {}  # nothing has reached the disk
    writer.flush()
    assert set(store.index()["records"]) == {"a.jpg"}
    assert torch.equal(CachedFeatures(store, store.index()).tokens("a.jpg", 1), tokens_of(0, torch.float32)[1])


def rewritten(store: FeatureStore, **keys):
    index = json.loads(store.index_file.read_text())
    store.index_file.write_text(json.dumps(index | keys))


def cut_short(store):
    store.array.write_bytes(store.array.read_bytes()[:-1])


def of_another_shape(store):
    np.save(store.array, np.zeros((6, 5, 3), np.uint16))


def of_objects(store):
    np.save(store.array, np.array([os.system] * 6, dtype=object), allow_pickle=True)


@pytest.mark.parametrize("spoil, words", [
    (cut_short, "photos-train.npy cannot be read"),
    (of_another_shape, r"holds uint16 \(6, 5, 3\), and by its index uint16 \(6, 5, 4\)"),
    (of_objects, "photos-train.npy cannot be read"),
    (lambda store: store.array.unlink(), "photos-train.npy is gone"),
    (lambda store: store.index_file.write_text("{"), "is no index of cached features"),
    (lambda store: store.index_file.write_text("[]"), "is no index of cached features"),
    (lambda store: rewritten(store, format=99), "is no index of cached features that this version reads"),
    (lambda store: rewritten(store, names=[*NAMES[:2], "a.jpg"]), "is no index"),
    (lambda store: rewritten(store, names=[[]]), "is no index"),
    (lambda store: rewritten(store, records={"a.jpg": 3}), "is no index"),
    (lambda store: rewritten(store, identity={"tokens": [5, -4], "dtype": "float32", "views": 1}), "is no index"),
    (lambda store: rewritten(store, identity={"tokens": SIZE, "dtype": "object", "views": 1}), "is no index"),
])  # fmt: skip
def test_files_that_are_something_else_are_refused(tmp_path, spoil, words):
    store = filled(tmp_path)
    store.merge()
    spoil(store)
    with pytest.raises(DataError, match=f"{words}.*; delete {tmp_path}, or set run.cache_features"):
        store.index()


def test_an_array_without_its_index_is_not_written_over(tmp_path):
    store = filled(tmp_path)
    store.index_file.unlink()
    before = store.array.read_bytes()
    with pytest.raises(DataError, match="photos-train.npy is there without its index photos-train.json; delete"):
        store.create({"tokens": SIZE, "dtype": "float32", "views": VIEWS}, NAMES, {})
    assert store.array.read_bytes() == before


@pytest.mark.parametrize("last", ["_write_index", "_finish"])
def test_a_kill_while_the_files_are_made_leaves_what_goes_on(tmp_path, monkeypatch, last):
    def killed(*args):
        raise KeyboardInterrupt

    store, identity = FeatureStore(tmp_path, "photos-train"), {"tokens": SIZE, "dtype": "float32", "views": VIEWS}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureStore, last, killed)
        store.create(identity, NAMES, {})
    again = FeatureStore(tmp_path, "photos-train")
    if again.index() is None:
        again.create(identity, NAMES, {})
    assert again.index()["names"] == NAMES and again.index()["records"] == {}


def test_a_file_is_known_by_its_content(tmp_path):
    file, other = tmp_path / "a.jpg", tmp_path / "missing.jpg"
    file.write_bytes(b"one")
    record = file_record(str(file))
    assert record["size"] == 3 and not has_changed(record, str(file))
    os.utime(file, ns=(1, 1))
    assert not has_changed(record, str(file))  # another time, the same bytes
    file.write_bytes(b"two")
    assert has_changed(record, str(file))
    file.write_bytes(b"longer")
    assert has_changed(record, str(file)) and has_changed(record, str(other))
    assert file_record(None) == file_record(str(other)) == {}
    assert not has_changed({}, str(other)) and has_changed({}, str(file)) and not has_changed({}, None)
