"""Several texts of a picture as one sample: every text once an epoch, and the order a function of seed and position."""

import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_evlgen.datasets import AskedImage, CaptionedImage, DataError, Question, QuestionDataset
from lavis_evlgen.datasets.annotations.conversations import ConversationRow
from lavis_evlgen.datasets.base import CaptionDataset
from lavis_evlgen.datasets.conversations import ConversationDataset
from lavis_evlgen.datasets.loading import train_loader
from lavis_evlgen.datasets.packing import TextGroups
from lavis_evlgen.datasets.shards.stream import ShardStream
from lavis_evlgen.media.errors import UnreadableImage
from tests.datasets.shard_tools import image_shards, sample, write_shard

# two sets, 2 to 1, six batches of two: texts, and (picture, torch's draw, Python's draw) of each picture
FROZEN = {
    "texts": [["0.2", "0.1"], ["0.1", "2.0"], ["1.1", "1.2"], ["0.0", "0.3"], ["0.0", "1.0"], ["1.0", "1.2"]],
    "pictures": [
        [0.0, 0.327996, 0.809439, 0.0, 0.63994, 0.256823], [0.0, 0.267734, 0.923052, 2.0, 0.066075, 0.51483],
        [1.0, 0.764655, 0.572148, 1.0, 0.680302, 0.932288], [0.0, 0.797805, 0.859487, 0.0, 0.180581, 0.402133],
        [0.0, 0.76446, 0.235594, 1.0, 0.600646, 0.071371], [1.0, 0.499, 0.023276, 1.0, 0.07547, 0.504879],
    ],
}  # fmt: skip


def to_tensor(number: int) -> torch.Tensor:
    """A picture is its number, and noise as an augmentation would draw."""
    return torch.tensor([float(number), torch.rand(()).item(), random.random()])


class Numbered:
    """A picture is its place in the list; those in `broken` cannot be read."""

    broken: frozenset = frozenset()

    def _load(self, row: dict) -> int:
        if row["image"] in self.broken:
            raise UnreadableImage(f"{row['image']}.jpg", "broken")
        return row["image"]


class Captions(Numbered, CaptionDataset):
    pass


class Questions(Numbered, QuestionDataset):
    pass


class Conversations(Numbered, ConversationDataset):
    pass


def captions(counts, name="a", broken=()) -> Captions:
    """counts[n] captions of picture n."""
    items = [CaptionedImage(n, f"id{n}", tuple(f"{n}.{k}" for k in range(count))) for n, count in enumerate(counts)]
    found = Captions(name, "train", items, vis_processor=to_tensor, text_processor=str)
    found.broken = frozenset(broken)
    return found


def batches(sets, most, count, batch=3, *, start=0, rank=0, world=1, workers=0, **keys):
    loader = train_loader(sets, keys.pop("ratios", None), batch, 11, rank, world, start, workers, False,
                          texts_per_image=most, **keys)  # fmt: skip
    return list(itertools.islice(loader, count))


def by_picture(batch: dict) -> list[tuple]:
    """(picture as a list, its texts) of each picture of a batch."""
    texts = iter(batch["text_input"])
    pictures, counts = batch["image"].tolist(), batch["texts_per_image"]
    found = [(picture, [next(texts) for _ in range(count)]) for picture, count in zip(pictures, counts, strict=True)]
    assert next(texts, None) is None
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(2, 5), st.integers(0, 2**40))
def test_every_text_is_in_one_group_of_an_epoch(counts, most, seed):
    groups = TextGroups(captions(counts), most, seed)
    assert len(groups) == sum(-(-count // most) for count in counts) and groups.pictures == len(counts)
    for epoch in range(3):
        rows = [groups.rows(epoch, group) for group in range(len(groups))]
        assert sorted(itertools.chain(*rows)) == list(range(sum(counts)))
        for own in rows:
            assert len({groups.dataset.annotation[row]["image_id"] for row in own}) == 1 and len(own) <= most
        sizes = Counter(groups.dataset.annotation[own[0]]["image_id"] for own in rows)
        assert sizes == {f"id{n}": -(-count // most) for n, count in enumerate(counts)}


def test_which_texts_stand_together_changes_from_epoch_to_epoch_and_with_the_seed():
    def together(epoch, seed):
        groups = TextGroups(captions([6, 6]), 2, seed)
        return frozenset(frozenset(groups.rows(epoch, group)) for group in range(len(groups)))

    assert together(3, 1) == together(3, 1)
    assert len({together(epoch, 1) for epoch in range(8)}) > 4
    assert len({together(0, seed) for seed in range(8)}) > 4
    assert any(len({frozenset(row % 6 for row in own) for own in together(0, seed)}) > 3 for seed in range(8)), (
        "pictures with as many texts are all cut alike"
    )


def test_a_stream_is_every_text_once_an_epoch_and_a_picture_is_read_once_for_its_texts():
    counts = [5, 1, 3, 2, 5]  # 3 + 1 + 2 + 1 + 3 groups of 2
    found = [one for batch in batches([captions(counts)], 2, 20, batch=1) for one in by_picture(batch)]
    everything = sorted(f"{n}.{k}" for n, count in enumerate(counts) for k in range(count))
    for epoch in (found[:10], found[10:]):
        assert sorted(text for _, texts in epoch for text in texts) == everything
    for (number, *_), texts in found:
        assert {int(text.split(".")[0]) for text in texts} == {number}
    assert len({tuple(picture) for picture, _ in found}) == 20  # each group draws its augmentation


def test_a_batch_has_texts_in_a_row_and_an_id_for_each():
    (batch,) = batches([captions([3, 3, 1])], 3, 1)
    assert batch["image"].shape == (3, 3) and sorted(batch["texts_per_image"]) == [1, 3, 3]
    assert [f"id{text.split('.')[0]}" for text in batch["text_input"]] == batch["image_id"]
    rows = captions([3, 3, 1]).annotation
    assert [rows[int(own)]["caption"] for own in batch["instance_id"]] == batch["text_input"] and batch["bad"] == []


def test_one_text_a_picture_is_the_stream_as_it_was():
    """Numbers of the rows and their augmentation, written down before groups were there."""
    found = batches([captions([2, 3, 1]), captions([4], "b")], 1, 6, batch=2, ratios=[2, 1])
    assert all("texts_per_image" not in batch for batch in found)
    assert [batch["text_input"] for batch in found] == FROZEN["texts"]
    for batch, pictures in zip(found, FROZEN["pictures"], strict=True):
        assert batch["image"].flatten().tolist() == pytest.approx(pictures, abs=1e-6)


@pytest.mark.parametrize("per_rank", [False, True])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 3), st.integers(0, 9), st.integers(2, 4))
def test_ranks_together_see_what_one_rank_sees_from_any_start(per_rank, batch, world, start, most):
    sets, keys = [captions([4, 1, 5]), captions([2, 3], "b")], {"ratios": [1, 2], "per_rank": per_rank}
    ranks = [[by_picture(one) for one in batches(sets, most, 5, batch, start=start, rank=rank, world=world, **keys)]
             for rank in range(world)]  # fmt: skip
    if per_rank:
        alone = batches(sets, most, 5 * world, batch, start=start * world, **keys)
        assert [one[m] for m in range(5) for one in ranks] == [by_picture(one) for one in alone]
    else:
        alone = batches(sets, most, 5, batch * world, start=start, **keys)
        assert [sum((one[m] for one in ranks), []) for m in range(5)] == [by_picture(one) for one in alone]


def test_workers_and_a_start_in_the_middle_change_nothing():
    sets = [captions([4, 1, 5, 2]), captions([3], "b")]
    whole = [by_picture(one) for one in batches(sets, 2, 12)]
    assert [by_picture(one) for one in batches(sets, 2, 12, workers=2)] == whole
    assert [by_picture(one) for one in batches(sets, 2, 5, start=7)] == whole[7:]


def test_without_ratios_sets_are_mixed_by_their_groups():
    sets = [captions([5] * 12), captions([1] * 12, "b")]  # 60 and 12 texts, 12 and 12 groups
    drawn = Counter(len(batch["text_input"]) for batch in batches(sets, 5, 400, 1))
    assert set(drawn) == {5, 1} and drawn[5] / 400 == pytest.approx(0.5, abs=0.08)


def test_a_group_of_an_unreadable_picture_moves_on_as_a_whole_and_is_counted_once():
    groups = TextGroups(captions([4, 2, 3], broken=[0, 1]), 2, 5)  # groups 0, 1 | 2 | 3, 4
    for group in range(5):
        found = groups[0, group]
        assert found["image"][0] == 2 and {text["image_id"] for text in found["texts"]} == {"id2"}
        met = ["0.jpg", "1.jpg"] if group < 2 else ["1.jpg"] if group == 2 else []
        assert [entry["image"] for entry in found["bad"]] == met
    batch = groups.collater([groups[0, 0], groups[0, 4]])
    assert [entry["image"] for entry in batch["bad"]] == ["0.jpg", "1.jpg"] and len(batch["image"]) == 2
    groups.dataset.broken, groups.dataset.vis_processor = frozenset(), _only_the_last  # as clips, read by the processor
    assert [entry["image"] for entry in groups[0, 1]["bad"]] == ["0.jpg", "1.jpg"]
    with pytest.raises(DataError, match="a: 2 images in a row cannot be read, from group 1 of train on"):
        TextGroups(captions([2, 2], broken=[0, 1]), 2, 5)[0, 1]


def _only_the_last(number: int) -> torch.Tensor:
    if number < 2:
        raise UnreadableImage(f"{number}.jpg", "its frames are gone")
    return to_tensor(number)


def test_questions_of_a_picture_bring_their_prompts_and_answers():
    asked = [AskedImage(n, f"id{n}", tuple(Question(f"{n}{k}?", (f"{n}{k}",), f"q{n}{k}") for k in range(4)))
             for n in range(3)]  # fmt: skip
    data = Questions("q", "train", asked, vis_processor=to_tensor, text_processor=str, template="Q: {} A:")
    seen = []
    for batch in batches([data], 3, 2):
        assert len(batch["image"]) == 3 and len(batch["prompt"]) == sum(batch["texts_per_image"])
        keys = ("prompt", "text_input", "question_id", "image_id", "question", "answer")
        for prompt, answer, number, image_id, question, same in zip(*(batch[key] for key in keys), strict=True):
            assert (prompt, answer, number, image_id) == (f"Q: {same}? A:", same, f"q{same}", f"id{same[0]}")
            assert question == f"{same}?"
            seen.append(answer)
        for picture, texts in by_picture(batch):
            assert {text[0] for text in texts} == {str(int(picture[0]))}
    assert sorted(seen) == sorted(f"{n}{k}" for n in range(3) for k in range(4))  # 6 groups


def test_conversations_of_a_picture_stay_together():
    rows = [ConversationRow(n % 2, (("user", f"{n}?"), ("assistant", "a")), n, f"id{n % 2}") for n in range(5)]
    data = Conversations("c", "train", rows, vis_processor=to_tensor)
    (batch,) = batches([data], 5, 1, batch=2)
    assert sorted(batch["texts_per_image"]) == [2, 3] and len(batch["conversations"]) == 5
    by_id = [int(words[0]["content"][:-1]) % 2 for words in batch["conversations"]]
    assert [f"id{n}" for n in by_id] == batch["image_id"] and sorted(batch["conversation_id"]) == list(range(5))


def test_shards_draw_captions_without_repetition(tmp_path):
    members = {
        **sample("a", ["one", "two", "three", "four"]), **sample("b", "alone"), **sample("c", ["left", "right"]),
    }  # fmt: skip
    write_shard(tmp_path / "x.tar", members)
    data, drawn = image_shards(f"{tmp_path}/x.tar"), Counter()
    samples, tally = ShardStream(data, 0, 0, 1, texts=3).take(90)
    for found in samples:
        texts = [text["text_input"] for text in found["texts"]]
        assert len(set(texts)) == len(texts) == {"a": 3, "b": 1, "c": 2}[found["texts"][0]["image_id"][-1]]
        drawn.update(texts)
    assert min(drawn[word] for word in ("one", "two", "three", "four")) > 12 and drawn["left"] == 30
    assert tally.met == 90
    batch = data.collater(samples[:3])
    assert sum(batch["texts_per_image"]) == len(batch["text_input"]) == len(batch["image_id"]) == 6
    plain = [found["instance_id"] for found in ShardStream(data, 0, 0, 1).take(90)[0]]
    assert plain == [found["texts"][0]["instance_id"] for found in samples]  # the same pictures as with one text


def test_shards_and_rows_in_one_mix(tmp_path):
    write_shard(tmp_path / "x.tar", {**sample("a", ["one", "two"]), **sample("b", ["three", "four"])})
    sets = [image_shards(f"{tmp_path}/x.tar"), captions([2, 2, 2])]
    sets[0].vis_processor = lambda picture: torch.zeros(3)
    found = batches(sets, 2, 30, batch=2, ratios=[1, 1])
    assert {batch.get("shards", (1,))[0] for batch in found} == {0, 1}
    assert all(batch["texts_per_image"] == [2, 2] and len(batch["text_input"]) == 4 for batch in found)
