"""Which row stands in for which: another source's, each row once, a function of the sources alone."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lavis_evlgen.tasks.blind_baseline import partners


@given(st.lists(st.integers(0, 12), max_size=60))
def test_every_row_has_a_partner_of_another_source_unless_one_source_is_most_rows(sources):
    found = partners(sources)
    there = [other for other in found if other is not None]
    assert len(found) == len(sources) and len(set(there)) == len(there)
    assert all(sources[row] != sources[other] for row, other in enumerate(found) if other is not None)
    largest = max(Counter(sources).values(), default=0)
    if 2 * largest <= len(sources):
        assert len(there) == len(sources)
    else:
        assert len(there) == 2 * (len(sources) - largest)


def test_neighbours_of_a_file_are_not_paired_with_each_other():
    """Neighbours in a file are often alike: 100 films of 3 clips, as MSVD has them."""
    films = [number // 3 for number in range(300)]
    distances = [abs(films[row] - films[other]) for row, other in enumerate(partners(films))]
    assert 25 < sum(distances) / 300 < 42  # a third of 100 films, as at random
    assert partners(films) == partners(films) and partners(list(map(str, films))) != partners(films)
