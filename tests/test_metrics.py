import numpy as np
import pytest

from supsup_jax import metrics

NAN = np.nan
FULL = np.array([[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.8, 0.5, 0.6]])
# After tasks 2 and 3 only: what was accurate right after task 1 is not known.
CHECKPOINTS = np.array([[NAN, NAN, NAN], [0.7, 0.8, NAN], [0.8, 0.5, 0.6]])


def test_average_accuracy():
    assert metrics.average_accuracy(FULL) == pytest.approx((0.8 + 0.5 + 0.6) / 3)


def test_average_incremental_accuracy():
    rows = (0.9 + 0.75 + 19 / 30) / 3
    assert metrics.average_incremental_accuracy(FULL) == pytest.approx(rows)
    assert metrics.average_incremental_accuracy(CHECKPOINTS) == pytest.approx((0.75 + 19 / 30) / 2)


def test_forgetting():
    assert metrics.forgetting(FULL) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.5)) / 2)
    assert metrics.forgetting(CHECKPOINTS) == pytest.approx(((0.7 - 0.8) + (0.8 - 0.5)) / 2)


def test_backward_transfer():
    assert metrics.backward_transfer(FULL) == pytest.approx(((0.8 - 0.9) + (0.5 - 0.8)) / 2)
    assert metrics.backward_transfer(CHECKPOINTS) == pytest.approx(((0.8 - 0.7) + (0.5 - 0.8)) / 2)


def test_forward_transfer():
    R = np.array([[0.9, 0.3, NAN], [0.7, 0.8, 0.25], [0.8, 0.5, 0.6]])
    untrained = np.array([0.2, 0.2, 0.2])
    assert metrics.forward_transfer(R, untrained) == pytest.approx((0.1 + 0.05) / 2)


def test_one_task_forgets_nothing():
    assert metrics.forgetting(np.array([[0.5]])) == 0.0
    assert metrics.backward_transfer(np.array([[0.5]])) == 0.0


def test_confusion_and_task_accuracy():
    counts = metrics.confusion([np.array([0, 0, 1]), np.array([1]), np.array([0, 2])])
    np.testing.assert_array_equal(counts, [[2, 1, 0], [0, 1, 0], [1, 0, 1]])
    assert metrics.task_accuracy(counts) == pytest.approx(4 / 6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"R must be \[T, T\]"):
        metrics.forgetting(np.ones((2, 3)))
    with pytest.raises(ValueError, match="last row of R"):
        metrics.average_accuracy(np.array([[0.5, NAN], [0.5, NAN]]))
    with pytest.raises(ValueError, match=r"untrained must be \[3\]"):
        metrics.forward_transfer(FULL, np.ones(2))
