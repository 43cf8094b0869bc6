import numpy as np
import pytest

from supsup_jax import metrics

NAN = np.nan
FULL = np.array([[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.8, 0.5, 0.6]])
# After tasks 2 and 3 only: what was accurate right after task 1 is not known.
CHECKPOINTS = np.array([[NAN, NAN, NAN], [0.7, 0.8, NAN], [0.8, 0.5, 0.6]])


@pytest.mark.parametrize(
    ("metric", "full", "checkpoints"),
    [
        (metrics.average_accuracy, (0.8 + 0.5 + 0.6) / 3, (0.8 + 0.5 + 0.6) / 3),
        (metrics.average_incremental_accuracy, (0.9 + 0.75 + 19 / 30) / 3, (0.75 + 19 / 30) / 2),
        (metrics.forgetting, (0.1 + 0.3) / 2, (-0.1 + 0.3) / 2),
        (metrics.backward_transfer, (-0.1 - 0.3) / 2, (0.1 - 0.3) / 2),
    ],
)
def test_metrics_by_hand(metric, full, checkpoints):
    assert metric(FULL) == pytest.approx(full)
    assert metric(CHECKPOINTS) == pytest.approx(checkpoints)


def test_forward_transfer():
    R = np.array([[0.9, 0.3, NAN], [0.7, 0.8, 0.25], [0.8, 0.5, 0.6]])
    untrained = np.array([0.2, 0.2, 0.2])
    assert metrics.forward_transfer(R, untrained) == pytest.approx((0.1 + 0.05) / 2)


def test_one_task_forgets_nothing():
    assert metrics.forgetting(np.array([[0.5]])) == 0.0
    assert metrics.backward_transfer(np.array([[0.5]])) == 0.0
    assert metrics.forward_transfer(np.array([[0.5]]), [0.1]) == 0.0


def test_confusion_and_task_accuracy():
    counts = metrics.confusion([np.array([0, 0, 1]), np.array([1]), np.array([0, 2])])
    np.testing.assert_array_equal(counts, [[2, 1, 0], [0, 1, 0], [1, 0, 1]])
    assert metrics.task_accuracy(counts) == pytest.approx(4 / 6)
    counts = metrics.confusion([np.array([0, 5, 6]), np.array([1, 7])])  # of eight, two were asked
    assert counts.shape == (2, 8) and metrics.task_accuracy(counts) == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="got -1: count decisions that were refused apart"):
        metrics.confusion([np.array([0, -1])])


# Windows of tasks 0..3: task 0 split over masks 0 and 1, mask 1 shared with task 1, task 2 lost.
TASKS = [0, 0, 0, 0, 1, 1, 2, 2, 3]
MASKS = [0, 0, 0, 1, 1, 1, -1, -1, 3]
COUNTS = np.array([[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])


def test_windows_are_counted_by_task_and_mask():
    np.testing.assert_array_equal(metrics.window_counts(TASKS, MASKS), COUNTS)
    assert metrics.window_counts(TASKS, MASKS, num_tasks=6).shape == (6, 4)
    assert metrics.window_counts([], []).shape == (0, 0)


def test_a_mask_belongs_to_the_task_of_most_windows():
    np.testing.assert_array_equal(metrics.task_of_mask(COUNTS), [0, 1, -1, 3])
    np.testing.assert_array_equal(metrics.mask_of_task(COUNTS), [0, 1, -1, 3])
    tie = np.array([[2, 2], [2, 0]])
    np.testing.assert_array_equal(metrics.task_of_mask(tie), [0, 0])
    np.testing.assert_array_equal(metrics.mask_of_task(tie), [0, 0])
    np.testing.assert_array_equal(metrics.mask_of_task(np.zeros((2, 0), int)), [-1, -1])


def test_found_tasks():
    got = metrics.found(COUNTS)
    assert got == metrics.Found(masks=3, found=3, purity=6 / 7, split=1, merged=1)
    assert metrics.found(10 * np.eye(5, dtype=int)) == metrics.Found(5, 5, 1.0, 0, 0)
    one_mask = np.full((5, 1), 10)
    assert metrics.found(one_mask) == metrics.Found(1, 1, 0.2, 0, 1)
    a_mask_a_window = np.ones((1, 10), int)
    assert metrics.found(a_mask_a_window) == metrics.Found(10, 1, 1.0, 1, 0)


def test_bad_counts():
    with pytest.raises(ValueError, match="at least one window"):
        metrics.found(np.zeros((2, 2), int))
    with pytest.raises(ValueError, match=r"\[true task, mask\] counts .* got float64 \(2, 2\)"):
        metrics.found(np.ones((2, 2)))
    with pytest.raises(ValueError, match="counts must be"):
        metrics.task_of_mask(np.array([[1, -1]]))
    with pytest.raises(ValueError, match=r"one of each a window, got \(2,\) and \(1,\)"):
        metrics.window_counts([0, 1], [0])


def test_bad_input():
    with pytest.raises(ValueError, match=r"R must be \[T, T\]"):
        metrics.forgetting(np.ones((2, 3)))
    with pytest.raises(ValueError, match="last row of R"):
        metrics.average_accuracy(np.array([[0.5, NAN], [0.5, NAN]]))
    with pytest.raises(ValueError, match=r"untrained must be \[3\]"):
        metrics.forward_transfer(FULL, np.ones(2))
