"""evaluate.py's pictures and the curves: what is drawn, read back from matplotlib's figures."""

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from sklearn.metrics import confusion_matrix

import data
import evaluate
import utils

NAMES = ["cat", "dog", "fox"]
LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 2])
PREDICTED = np.array([0, 0, 1, 2, 1, 2, 0, 1])
RESULT = evaluate.Result(NAMES, LABELS, PREDICTED, np.ones(8), "results", {})


def cells(figure) -> np.ndarray:
    """The values of a heat map, the first row on top."""
    (mesh,) = (x for x in figure.axes[0].collections if isinstance(x, QuadMesh))
    return mesh.get_array()


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_heat_map_has_true_classes_as_rows_each_divided_by_its_images():
    figure = evaluate.draw_matrix(evaluate.count_matrix(RESULT), NAMES)
    expected = confusion_matrix(LABELS, PREDICTED, normalize="true")
    assert np.allclose(cells(figure), expected) and not np.allclose(expected, expected.T)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert texts(axes.get_yticklabels()) == NAMES and axes.yaxis_inverted()
    # The numbers row by row, nothing where no image is:
    assert texts(axes.texts) == ["2", "", "", "", "2", "1", "1", "1", "1"]


def test_heat_map_of_100_classes_is_grouped_by_superclass():
    matrix = np.zeros((100, 100), int)
    matrix[data.CLASSES.index("flatfish"), data.CLASSES.index("seal")] = 7
    names, groups = sum(data.SUPERCLASSES.values(), ()), list(data.SUPERCLASSES)
    figure = evaluate.draw_matrix(data.by_superclass(matrix), names, groups)
    ((row, column),) = np.argwhere(cells(figure))
    assert (names[row], names[column], groups[row // 5]) == ("flatfish", "seal", "fish")
    axes = figure.axes[0]
    assert texts(axes.get_yticklabels()) == list(names)
    right = next(child for child in axes.child_axes if len(child.get_yticks()) == 20)
    assert texts(right.get_yticklabels()) == groups


def make_history(first: int, losses: list[float], accuracies: list[float]) -> list[dict]:
    """Epochs from first on; figures of training differ from those of validation."""
    return [
        {"epoch": epoch, "learning_rate": loss / 10, "val_loss": loss, "val_accuracy": accuracy}
        | {"train_loss": loss / 2, "train_accuracy": accuracy / 2}
        for epoch, (loss, accuracy) in enumerate(zip(losses, accuracies), start=first)
    ]


@pytest.mark.parametrize(("first", "watch", "best"), [(0, "loss", 1), (1, "accuracy", 3)])
def test_curves_have_a_star_on_the_best_epoch_and_say_what_was_augmented(first, watch, best):
    history = make_history(first, [3.0, 1.0, 1.5, 2.5], [0.2, 0.3, 0.4, 0.3])
    figure = utils.draw_curves(history, watch)
    for axes, name in zip(figure.axes, ("loss", "accuracy")):
        lines = {line.get_marker(): line for line in axes.lines}
        assert lines["*"].get_xydata().tolist() == [[best, history[best - first][f"val_{name}"]]]
        assert lines["*"].get_label() == f"best epoch by validation {watch}: {best}"
        assert lines["s"].get_ydata().tolist() == [row[f"val_{name}"] for row in history]
        assert lines["o"].get_ydata().tolist() == [row[f"train_{name}"] for row in history]
        from_epoch_1 = "" if first else " from epoch 1"  # epoch 0 trains the head on plain images
        assert lines["o"].get_label() == f"training, augmented{from_epoch_1}"


def test_curves_of_a_head_alone_show_its_own_epochs():
    (row,) = make_history(0, [1.5], [0.4])
    row["head"] = [(4.0, 0.1), (2.0, 0.3)]
    for place, axes in enumerate(utils.draw_curves([row], "loss").axes[:2]):
        (line,) = [line for line in axes.lines if "the head's epochs" in line.get_label()]
        expected = [[-0.5, row["head"][0][place]], [0, row["head"][1][place]]]
        assert line.get_xydata().tolist() == expected


@pytest.mark.parametrize("epochs", [1, 2, 30, 300])
def test_curves_are_over_whole_epochs(epochs):
    falling = [1 / epoch for epoch in range(1, epochs + 1)]
    figure = utils.draw_curves(make_history(1, falling, falling), "loss")
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [epochs, epochs, 1]
        assert all(tick.lstrip("−").isdigit() for tick in texts(axes.get_xticklabels()))
    for axes in figure.axes:
        for text in texts(axes.get_yticklabels(which="both")):
            assert not {"e", "$"} & set(text)  # 0.006, neither 6e-03 nor mathematics
