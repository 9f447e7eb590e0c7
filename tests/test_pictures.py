"""evaluate.py's pictures: what is drawn in them, read back from matplotlib's figures."""

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from sklearn.metrics import confusion_matrix, f1_score

import data
import evaluate
import utils

NAMES = ["cat", "dog", "fox"]
# Image i is a square of gray 10 * i. The fourth and the last two are mistakes, the last the surest.
LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 2])
PREDICTED = np.array([0, 0, 1, 2, 1, 2, 0, 1])
CONFIDENCE = np.array([0.9, 0.8, 0.7, 0.55, 0.6, 0.95, 0.65, 0.85])
IMAGES = torch.arange(8, dtype=torch.uint8)[:, None, None, None].mul(10).expand(8, 3, 16, 16)


@pytest.fixture
def result():
    return evaluate.Result(NAMES, LABELS, PREDICTED, CONFIDENCE, "results", {})


def cells(figure) -> np.ndarray:
    """The values of a heat map, the first row on top."""
    (mesh,) = (x for x in figure.axes[0].collections if isinstance(x, QuadMesh))
    return mesh.get_array().reshape(mesh.get_array().shape)


def test_heat_map_has_true_classes_as_rows_each_divided_by_its_images(result):
    figure = evaluate.draw_matrix(result.matrix, NAMES)
    expected = confusion_matrix(LABELS, PREDICTED, normalize="true")
    assert np.allclose(cells(figure), expected) and not np.allclose(expected, expected.T)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [x.get_text() for x in axes.get_yticklabels()] == NAMES
    assert axes.yaxis_inverted()
    numbers = [x.get_text() for x in axes.texts]  # row by row, nothing where no image is
    assert numbers == ["2", "", "", "", "2", "1", "1", "1", "1"]


def test_heat_map_of_100_classes_is_grouped_by_superclass():
    matrix = np.zeros((100, 100), int)
    flatfish, seal = data.CLASSES.index("flatfish"), data.CLASSES.index("seal")
    matrix[flatfish, seal] = 7
    names = [x for group in data.SUPERCLASSES.values() for x in group]
    figure = evaluate.draw_matrix(data.by_superclass(matrix), names, list(data.SUPERCLASSES))
    ((row, column),) = np.argwhere(cells(figure))
    assert (names[row], names[column]) == ("flatfish", "seal")
    labels = [x.get_text() for x in figure.axes[0].get_yticklabels()]
    assert labels[row] == "flatfish" and len(labels) == 100
    groups = [child for child in figure.axes[0].child_axes if len(child.get_yticks()) == 20]
    assert [x.get_text() for x in groups[0].get_yticklabels()] == list(data.SUPERCLASSES)
    assert list(data.SUPERCLASSES)[row // 5] == "fish"


def test_mistakes_are_only_mistakes_and_the_surest_first(result):
    figure = evaluate.draw_mistakes(result, IMAGES)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "true: fox\npredicted: dog\nconfidence: 85.00 %",
        "true: fox\npredicted: cat\nconfidence: 65.00 %",
        "true: dog\npredicted: fox\nconfidence: 55.00 %",
    ]
    assert [axes.images[0].get_array()[0, 0, 0] for axes in figure.axes] == [70, 60, 30]


def test_confused_pairs_show_images_of_both_classes_and_of_both_mistakes(result):
    figure = evaluate.draw_pairs(result, IMAGES)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:4] == [
        "dog recognised: 2",
        "dog taken for fox: 1",
        "fox taken for dog: 1",
        "fox recognised: 1",
    ]
    first, *_, last = figure.axes[:4]
    grays = [set(np.unique(axes.images[0].get_array())) for axes in (first, last)]
    assert grays[0] == {20, 40, 255} and grays[1] == {50, 255}  # and white where there is none


def test_bars_of_f1_begin_with_the_worst_class(result):
    axes = evaluate.draw_f1(result).axes[0]
    f1 = f1_score(LABELS, PREDICTED, average=None)
    order = np.argsort(f1, kind="stable")
    assert [x.get_text() for x in axes.get_yticklabels()] == [NAMES[i] for i in order]
    assert np.allclose([bar.get_width() for bar in axes.patches], f1[order])
    assert axes.yaxis_inverted() and axes.get_xlabel() == "F1"


def test_reliability_shows_accuracy_and_share_of_each_bin():
    confidence = np.array([0.51, 0.52, 0.52, 0.99])
    labels, predicted = np.array([0, 0, 0, 0]), np.array([0, 0, 1, 0])
    result = evaluate.Result(NAMES, labels, predicted, confidence, "", {})
    upper, lower = evaluate.draw_reliability(result).axes
    accuracy, share = ([bar.get_height() for bar in axes.patches] for axes in (upper, lower))
    # fifteenths: 0.51 and 0.52 are in the eighth bin, 0.99 in the last
    assert np.flatnonzero(accuracy).tolist() == np.flatnonzero(share).tolist() == [7, 14]
    assert (accuracy[7], accuracy[14]) == (pytest.approx(2 / 3), 1)
    assert (share[7], share[14]) == (0.75, 0.25)


@pytest.mark.parametrize(("watch", "best"), [("loss", 2), ("accuracy", 3)])
def test_star_is_on_the_epoch_that_was_best(watch, best):
    history = [
        {"epoch": epoch, "learning_rate": 0.1, "train_loss": 2.0, "train_accuracy": 0.1}
        | {"val_loss": loss, "val_accuracy": accuracy}
        for epoch, loss, accuracy in ((1, 3.0, 0.2), (2, 1.0, 0.3), (3, 1.5, 0.4), (4, 2.5, 0.3))
    ]
    figure = utils.draw_curves(history, watch)
    for axes, name in zip(figure.axes, ("loss", "accuracy")):
        lines = {line.get_marker(): line for line in axes.lines}
        assert lines["*"].get_xydata().tolist() == [[best, history[best - 1][f"val_{name}"]]]
        assert lines["s"].get_ydata().tolist() == [row[f"val_{name}"] for row in history]
        assert lines["o"].get_ydata().tolist() == [row[f"train_{name}"] for row in history]


def test_curves_of_a_head_alone_show_its_own_epochs():
    row = {"epoch": 0, "learning_rate": 0.1, "train_loss": 2.0, "train_accuracy": 0.3}
    row |= {"val_loss": 1.5, "val_accuracy": 0.4, "head": [(4.0, 0.1), (2.0, 0.3)]}
    for place, axes in enumerate(utils.draw_curves([row], "loss").axes[:2]):
        (line,) = [line for line in axes.lines if "the head's epochs" in line.get_label()]
        expected = [[-0.5, row["head"][0][place]], [0, row["head"][1][place]]]
        assert line.get_xydata().tolist() == expected
