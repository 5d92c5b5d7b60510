"""Where two answers part."""

import pytest

from transformers_confu.common.texts import first_difference


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 4, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ([], [], None)],
)
def test_first_difference(one, other, place):
    assert first_difference(one, other) == first_difference(other, one) == place
