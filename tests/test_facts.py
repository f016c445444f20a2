"""Facts of a shard survive the way through a file exactly, and a file cannot name what is built from it."""

import json
from collections import Counter

import numpy as np
import pytest

from mim.contracts import DataError
from mim.data import facts


class Sums:
    def __init__(self, **fields):
        vars(self).update(fields)


def test_values_come_back_exactly(tmp_path):
    value = {
        ("uint8", 3): np.array([2**80, -1, 0.1], dtype=object),
        "levels": np.arange(12, dtype=np.int64).reshape(3, 4),
        "floats": np.array([0.1, 1e-300, np.pi], np.float64),
        "empty": np.zeros((0, 2), np.float32),
        "sizes": [(3, 4), (5, 6)],
        "labels": Counter({3: 2, 0: 7}),
        "endings": {"png", "jpg"},
        "more": [None, True, 1, 2.5, "\u00fc\udcff"],
    }
    facts.save(tmp_path / "x.json", value)
    found = facts.load(tmp_path / "x.json")
    assert found.keys() == value.keys()
    for name, expected in value.items():
        if isinstance(expected, np.ndarray):
            assert found[name].dtype == expected.dtype
            assert found[name].shape == expected.shape
            assert found[name].tolist() == expected.tolist()
        else:
            assert found[name] == expected
            assert type(found[name]) is type(expected)


def test_objects_come_back_as_the_classes_that_were_asked_for(tmp_path):
    facts.save(tmp_path / "x.json", Sums(count=3, inner=Sums(levels=np.ones(2))))
    found = facts.load(tmp_path / "x.json", Sums)
    assert isinstance(found, Sums)
    assert found.count == 3
    assert found.inner.levels.tolist() == [1, 1]


@pytest.mark.parametrize(
    "content",
    [{"object": "Popen", "fields": {}}, {"array": {"list": [1]}, "dtype": "int64", "shape": [2]}, {"exec": [1]}, {}],
)
def test_what_was_not_written_by_save_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="holds no facts of a shard"):
        facts.load(tmp_path / "x.json", Sums)


def test_a_torn_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"list": [1, 2')
    with pytest.raises(DataError, match="delete it"):
        facts.load(tmp_path / "x.json")
