import pytest

from lavis_evlgen.evaluation import order_accuracy
from lavis_evlgen.evaluation.order import order_word

TRUE = {1: "red circle moves left", 2: "red circle moves right", 3: ["blue star turns pink", "turns"], 4: "red ring",
        5: "red heart and blue star part"}


def test_the_order_word_alone_counts():
    predicted = {1: "A pink cross, moves left.", 2: "red circle moves left", 3: "star turns pink", 5: "collide"}
    assert order_accuracy(predicted, TRUE) == {
        "order_accuracy": 0.5, "order_accuracy left/right": 0.5, "order_accuracy turns": 1.0,
        "order_accuracy collide/part": 0.0, "order_asked": 4,
    }  # fmt: skip
    assert order_accuracy({key: text if isinstance(text, str) else text[0] for key, text in TRUE.items()}, TRUE)[
        "order_accuracy"
    ] == 1.0


@pytest.mark.parametrize("said", ["", "red circle moves", "moves left and right", "red circle appears", "moves up"])
def test_no_word_both_words_or_words_of_another_kind_are_wrong(said):
    assert order_accuracy({1: said}, {1: TRUE[1]})["order_accuracy"] == 0


def test_turning_is_told_by_what_comes_out():
    true = {1: "blue star turns pink", 2: "pink star turns blue"}
    for said in ("blue star turns pink", "pink star turns pink", "star turns pink"):
        assert order_accuracy(dict.fromkeys(true, said), true)["order_accuracy"] == 0.5
    assert order_accuracy({1: "blue star turns"}, {1: true[1]})["order_accuracy"] == 0
    assert order_word("blue star turns pink") == (("turns",), "pink") and order_word("a red star") is None


def test_what_cannot_be_asked_is_an_error():
    with pytest.raises(ValueError, match="no predicted caption of 2"):
        order_accuracy({1: "moves left"}, {1: TRUE[1], 2: TRUE[2]})
    with pytest.raises(ValueError, match="no true caption says an order"):
        order_accuracy({4: "x"}, {4: TRUE[4]})
