"""Samples of several sources in shares, by their number alone."""

from collections import Counter

import pytest

from cat_diffusion.cat_core.data.manifest import ManifestError
from cat_diffusion.cat_core.training.mixture import Mixture


def drawn(mixture, numbers):
    return [mixture.record(number) for number in numbers]


def test_one_source_gives_each_record_once_an_epoch():
    records = drawn(Mixture([3, 4], 0), range(21))
    for epoch in range(3):
        assert sorted(records[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert records[:7] != records[7:14]


def test_shares_are_kept_and_no_record_is_preferred():
    mixture = Mixture([50, 300], 5, [80, 20])
    records = drawn(mixture, range(3000))
    assert sum(record < 50 for record in records) == 2400
    counts = Counter(records)
    assert {counts[record] for record in range(50)} == {48}
    assert {counts[record] for record in range(50, 350)} == {2}
    early = records[:100]
    assert 60 < sum(record < 50 for record in early) < 97  # the order is drawn


def test_a_sample_depends_on_its_number_alone():
    records = drawn(Mixture([50, 300, 7], 5, [1, 1, 1]), range(2500))
    other = Mixture([50, 300, 7], 5, [1, 1, 1])
    for number in (2400, 3, 1999, 2001, 1000, 0):
        assert other.record(number) == records[number]
    assert drawn(Mixture([50, 300, 7], 6, [1, 1, 1]), range(2500)) != records


def test_what_replaces_a_record_is_of_the_same_source():
    mixture = Mixture([5, 300], 0, [80, 20])
    number = next(number for number in range(50) if mixture.record(number) < 5)
    tried = {mixture.record(number, attempt) for attempt in range(mixture.attempts(number))}
    assert tried <= set(range(5))


@pytest.mark.parametrize(
    "lengths, weights, words",
    [
        ([5, 5], [1], "There are 1 weights for 2 manifests. Give each one."),
        ([5, 5], [1, 0], "weight of manifest 2 is 0 of 1, expected at least a thousandth"),
        ([5, 5], [1, -1], "weight of manifest 1 is 1 of 0"),
        ([5, 0], [1, 1], "nothing to train on in manifest 2, which has no record"),
    ],
)
def test_weights_that_do_not_fit_are_said(lengths, weights, words):
    with pytest.raises(ManifestError, match=words):
        Mixture(lengths, 0, weights)
