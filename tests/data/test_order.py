import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unmask.data.order import shuffled, some_of


@given(n=st.integers(1, 300), limit=st.integers(1, 400))
def test_a_choice_is_ascending_without_repeats_and_always_the_same(n, limit):
    chosen = some_of(n, limit)
    assert len(chosen) == min(n, limit)
    assert (np.diff(chosen) > 0).all()
    assert ((chosen >= 0) & (chosen < n)).all()
    assert (chosen == some_of(n, limit)).all()


def test_classes_that_take_turns_are_all_chosen():
    counts = np.bincount(some_of(10_000, 400) % 10, minlength=10)
    assert counts.min() > 15


def test_a_shuffle_is_a_permutation_of_its_own_for_each_seed():
    assert sorted(shuffled(50, seed=1)) == list(range(50))
    assert (shuffled(50, seed=1) != shuffled(50, seed=2)).any()
