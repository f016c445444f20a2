import pytest

from mim.data.picks import keyed_picks


@pytest.mark.parametrize("num_samples", [1, 64, 65, 250, 10**12])
def test_as_many_different_samples_as_asked_for_or_all_are_picked(num_samples):
    picks = keyed_picks(num_samples, 64, "sheet")
    assert len(picks) == len(set(picks)) == min(64, num_samples)
    assert picks == sorted(picks)
    assert 0 <= picks[0] <= picks[-1] < num_samples
    assert picks == keyed_picks(num_samples, 64, "sheet")


def test_another_purpose_picks_others():
    assert keyed_picks(10**6, 64, "sheet") != keyed_picks(10**6, 64, "statistics")
