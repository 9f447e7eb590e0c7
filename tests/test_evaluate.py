"""evaluate.py: its numbers by hand or by other sources, its pictures, and the script end to end."""

import csv
import json
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import BytesIO, StringIO, TextIOWrapper

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib import pyplot as plt
from PIL import Image
from scripts import ROOT, torchrun_environment
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_recall_fscore_support

import data
import evaluate
import model as resnet
import train
import utils

OFFICIAL = ROOT / "data" / "cifar-100-python"

TABLES = {"metrics.json", "confusion_matrix.csv", "predictions.csv"}
TABLES |= {"classification_report.txt", "classification_report.csv"}
PICTURES = {"confusion_matrix.png", "most_confused.png", "mistakes.png"}
PICTURES |= {"per_class.png", "reliability.png", "training_curves.png"}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint after one epoch on 50 digits: it takes every image for the same class."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--demo", "--epochs", "1", "--train-per-class", "5", "--checkpoint-dir", str(folder)]
    with redirect_stdout(StringIO()) as output:
        train.main(flags)
    assert "note     best.pt is selected on the test images; --holdout-per-" in output.getvalue()
    return folder / "best.pt"


@pytest.fixture(scope="session")
def checkpoint(trained, tmp_path_factory):
    """The same with its last layer fitted by scikit-learn: right and wrong in many ways."""
    state, (images, labels, _) = (
        torch.load(trained),
        data.read_digits("train")[0].select(torch.arange(300)),
    )
    model = resnet.build_model("resnet50", 10)
    model.load_state_dict(state["model"])
    features = []
    model.fc[1].register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.no_grad():
        batch = data.NormalizeAndResize(32, torch.device("cpu"))(images / 255)
        for module in model.modules():
            module.momentum = 1.0  # batch norm takes this batch's statistics
        model.train()(batch)
        model.eval()(batch)
        fit = LogisticRegression(C=1e4).fit(features[-1], labels)
        model.fc[3].weight[:], model.fc[3].bias[:] = map(
            torch.from_numpy, (fit.coef_, fit.intercept_)
        )
    state["model"] = model.state_dict()
    state["constants"]["holdout_per_class"] = 5
    path = tmp_path_factory.mktemp("fitted") / "best.pt"
    utils.save_checkpoint(path, state)
    return path


@pytest.fixture(scope="session")
def evaluation(checkpoint, tmp_path_factory):
    """The results of that network with --tta, where another network left a picture; the output."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "superclass_confusion_matrix.png").write_text("of a network for CIFAR-100")
    with redirect_stdout(StringIO()) as output:
        run_main(checkpoint, folder, "--tta")
    return folder, output.getvalue()


@pytest.fixture(scope="session")
def results(evaluation):
    return evaluation[0]


def run_main(checkpoint, folder, *flags):
    evaluate.main(["--checkpoint", str(checkpoint), "--results-dir", str(folder), *map(str, flags)])
    return folder


def run_script(*flags, backend=""):
    """python evaluate.py in a process of its own, on a machine without a display."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in displays}
    return subprocess.run(
        [sys.executable, "evaluate.py", *map(str, flags)],
        cwd=ROOT,
        env=environment | {"MPLBACKEND": backend},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def as_result(labels, predicted, classes):
    confidence = np.ones(len(labels))
    return evaluate.Result(classes, np.array(labels), np.array(predicted), confidence, "", {})


# ---- numbers ------------------------------------------------------------------------------------


def test_scores_of_classes_agree_with_hand_worked_numbers():
    result = as_result([0, 0, 0, 2], [0, 0, 2, 2], ["a", "b", "c"])
    precision, recall, f1 = result.scores
    assert precision.tolist() == pytest.approx([1, 0, 1 / 2])
    assert recall.tolist() == pytest.approx([2 / 3, 0, 1])
    assert f1.tolist() == pytest.approx([0.8, 0, 2 / 3])
    assert result.support.tolist() == [3, 0, 1]


def test_scores_of_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    labels, predicted = rng.integers(6, size=(2, 200))
    labels[labels == 5], predicted[predicted == 4] = 0, 0  # one never true, one never predicted
    result = as_result(labels, predicted.tolist(), list("abcdef"))
    expected = precision_recall_fscore_support(labels, predicted, labels=range(6), zero_division=0)
    np.testing.assert_allclose([*result.scores, result.support], expected)


def test_classes_without_test_images_are_in_neither_macro_f1_nor_the_worst_classes():
    result = as_result([0, 0, 0, 2], [0, 0, 2, 1], ["a", "b", "c", "d"])
    assert result.worst_first.tolist() == [2, 0]
    axes = evaluate.draw_f1(result).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0, 0.8])


def test_confused_pairs_add_up_both_ways_and_name_the_commoner():
    matrix = np.array([[5, 1, 0], [3, 5, 2], [0, 2, 5]])
    assert evaluate.find_confused_pairs(matrix, ["a", "b", "c"]) == [
        {"true": "b", "taken_for": "a", "images": 3, "other_way": 1},
        {"true": "b", "taken_for": "c", "images": 2, "other_way": 2},
    ]
    assert evaluate.find_confused_pairs(np.diag([3, 4]), ["a", "b"]) == []


def test_calibration_error_of_a_hand_worked_case():
    # Four at 0.95, three right: a gap of 0.2 for 4/5 of the images; one right at 0.55: 0.45.
    result = as_result([0, 0, 0, 0, 0], [0, 0, 0, 1, 0], ["a", "b"])
    result.confidence = np.array([0.95] * 4 + [0.55])
    *_, error = evaluate.calibrate(result)
    assert error == pytest.approx(0.8 * 0.2 + 0.2 * 0.45)


def test_calibration_bins_hold_their_upper_edge():
    result = as_result([0] * 4, [0] * 4, ["a", "b"])
    result.confidence = np.array([0.0, 0.2, 0.21, 1.0])
    images, _, _ = evaluate.calibrate(result)
    assert np.flatnonzero(images).tolist() == [0, 2, 3, 14]  # 0.2 is the third of 15 bins' end


def test_interval_of_accuracy_agrees_with_the_normal_approximation():
    matrix = np.array([[4000, 1000], [1000, 4000]])
    low, high = evaluate.bootstrap_intervals(matrix)["top1_accuracy"]
    sigma = (0.8 * 0.2 / 10_000) ** 0.5
    assert (low, high) == pytest.approx((0.8 - 1.96 * sigma, 0.8 + 1.96 * sigma), abs=0.0008)


def test_interval_of_macro_f1_agrees_with_resampled_images():
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=300)
    predicted = np.where(rng.random(300) < 0.7, labels, rng.integers(3, size=300))
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (labels, predicted), 1)
    draws = (rng.integers(300, size=300) for _ in range(500))
    naive = [f1_score(labels[draw], predicted[draw], average="macro") for draw in draws]
    expected = pytest.approx(np.percentile(naive, [2.5, 97.5]), abs=0.012)
    assert evaluate.bootstrap_intervals(matrix)["macro_f1"] == expected
    with_an_absent_class = np.pad(matrix, (0, 1))
    assert evaluate.bootstrap_intervals(with_an_absent_class)["macro_f1"] == expected


def test_superclass_matrix_agrees_with_the_official_coarse_labels():
    if not (OFFICIAL / "test").exists():
        pytest.skip("the official CIFAR-100 files are not in data/cifar-100-python")
    with open(OFFICIAL / "test", "rb") as file:
        official = pickle.load(file, encoding="latin1")
    fine, coarse = np.array(official["fine_labels"]), np.array(official["coarse_labels"])
    expected = np.zeros((20, 20), int)
    np.add.at(expected, (coarse, np.roll(coarse, 1)), 1)  # each predicted as its neighbour is
    result = as_result(fine, np.roll(fine, 1), data.CLASSES)
    grouped = data.by_superclass(result.matrix)
    assert (data.count_superclasses(grouped) == expected).all()


# ---- the script ---------------------------------------------------------------------------------


def test_numbers_are_those_of_the_training_log(trained, tmp_path):
    with open(trained.with_name("history.csv")) as file:
        (epoch,) = csv.DictReader(file)
    metrics = read_metrics(run_main(trained, tmp_path))
    assert metrics["loss"] == pytest.approx(float(epoch["val_loss"]), rel=1e-6)
    assert metrics["top1_accuracy"] == float(epoch["val_accuracy"])
    assert (metrics["images"], metrics["epoch"], metrics["dataset"]) == (360, 1, "digits")
    assert metrics["test_images_chose_checkpoint"] is True


def test_predictions_recompute_top1_and_the_matrix_with_the_official_labels(results):
    official = data.read_digits("test")[0].labels.tolist()
    _, *rows = read_csv(results / "predictions.csv")
    assert [int(index) for index, *_ in rows] == list(range(360))
    assert [int(label) for _, label, *_ in rows] == official
    predicted = [int(row[2]) for row in rows]
    hits = sum(guess == label for guess, label in zip(predicted, official))
    assert hits / 360 == read_metrics(results)["top1_accuracy"]

    header, *counts = read_csv(results / "confusion_matrix.csv")
    assert header[1:] == [name for name, *_ in counts] == list("0123456789")
    pairs = list(zip(official, predicted))
    for label, (_, *row) in enumerate(counts):
        assert [int(cell) for cell in row] == [pairs.count((label, guess)) for guess in range(10)]


def test_every_file_is_written_and_every_picture_opens(results):
    assert {path.name for path in results.iterdir()} == TABLES | PICTURES
    for name in PICTURES:
        with Image.open(results / name) as picture:
            picture.load()
            assert min(picture.size) > 250, name


def test_superclasses_of_digits_are_left_out(evaluation):
    folder, output = evaluation
    assert "nothing to draw" not in output
    assert not (folder / "superclass_confusion_matrix.png").exists()


def test_tta_of_a_run_without_flips_comes_with_a_warning(evaluation):
    assert "note     trained with FLIP = 0: mirror images may lower the accuracy" in evaluation[1]


def test_it_says_that_a_hold_out_leaves_the_test_images_untouched(evaluation):
    folder, output = evaluation
    assert "these images were used neither to train nor to select the checkpoint" in output
    assert read_metrics(folder)["test_images_chose_checkpoint"] is False


def test_tta_averages_logits_over_image_and_mirror(checkpoint, evaluation):
    folder, output = evaluation
    state, (test, _) = torch.load(checkpoint), data.read_digits("test")
    model = resnet.build_model("resnet50", 10).to(memory_format=torch.channels_last)
    model.load_state_dict(state["model"])
    plain, mirrored = (
        resnet.predict(model, data.EvalLoader(view, 64, 32), utils.DTYPES[state["precision"]])
        for view in (test.images, test.images.flip(3))
    )
    figures = read_metrics(folder)
    for logits, metrics in (plain + mirrored, figures), (plain, figures["without_tta"]):
        accuracy = (logits.argmax(1) == test.labels).double().mean().item()
        assert metrics["top1_accuracy"] == pytest.approx(accuracy)
        assert f"{100 * accuracy:.2f} %" in output
    assert figures["top1_accuracy"] != figures["without_tta"]["top1_accuracy"]


def test_history_beside_the_checkpoint_counts_only_if_it_is_the_same_runs(tmp_path):
    best, history = tmp_path / "best.pt", tmp_path / "history.csv"
    longer, other = ([{"epoch": 1, "val_loss": x}, {"epoch": 2, "val_loss": 0.5}] for x in (1, 0.7))
    history.write_text("epoch,val_loss\n1,1.0\n2,0.5\n")
    assert utils.read_history(best, longer[:1]) == longer
    with_head = [
        longer[0] | {"head": [[0.5, 0.9]]}
    ]  # the losses of the head's epochs, not in the file
    assert utils.read_history(best, with_head) == with_head + longer[1:]
    assert utils.read_history(best, other[:1]) == other[:1]
    for damaged in (b"epoch,val_loss\n1,half\n", bytes(200_000), b"epoch,val_loss\n1,\xff\n"):
        history.write_bytes(damaged)
        assert utils.read_history(best, other) == other
    history.unlink()
    assert utils.read_history(best, other) == other


def test_a_results_folder_that_cannot_be_written_is_one_message(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match="file/results cannot be written: Not a directory"):
        run_main(checkpoint, tmp_path / "file" / "results")


def test_results_that_cannot_all_be_written_leave_the_earlier_ones_alone(
    checkpoint, tmp_path, monkeypatch
):
    """A disk that is full at the fourth picture."""
    run_main(checkpoint, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == TABLES | PICTURES
    saved, save = [], evaluate.Figure.savefig

    def savefig(self, path, **options):
        saved.append(path)
        if len(saved) == 4:
            raise OSError(28, "No space left on device")
        save(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Figure, "savefig", savefig)
        with pytest.raises(SystemExit, match="cannot be written: No space left on device"):
            run_main(checkpoint, tmp_path, "--tta")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "comparison.png").write_text("of an earlier evaluation")
    run_main(checkpoint, tmp_path, "--tta")
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
    assert read_metrics(tmp_path)["tta"] is True


def test_a_checkpoint_of_another_network_is_one_message(checkpoint, tmp_path):
    state = torch.load(checkpoint)
    state["classes"] = ["only", "two"]
    utils.save_checkpoint(tmp_path / "other.pt", state)
    with pytest.raises(utils.UserError, match="other.pt does not fit this program: size mismatch"):
        run_main(tmp_path / "other.pt", tmp_path)


def test_tta_holds_the_images_once(checkpoint, monkeypatch):
    held = set()

    class Loader(data.EvalLoader):
        def __iter__(self):
            held.add(self.images.untyped_storage().data_ptr())
            return super().__iter__()

    monkeypatch.setattr(data, "EvalLoader", Loader)
    flags = ["--checkpoint", str(checkpoint), "--tta"]
    classifier = evaluate.Classifier(utils.parse_flags(evaluate.__file__, flags))
    assert classifier.predict(data.read_digits("test")[0].images[:70]).shape == (2, 70, 10)
    assert len(held) == 1


def test_classes_without_test_images_are_in_the_report_and_in_a_note(
    checkpoint, tmp_path, monkeypatch, capsys
):
    test, classes = data.read_digits("test")
    some = test.select((test.labels != 3) & (test.labels != 7))
    monkeypatch.setattr(data, "read_digits", lambda part: (some, classes))
    run_main(checkpoint, tmp_path, "--no-show")
    lines = (tmp_path / "classification_report.txt").read_text().splitlines()[2:12]
    assert [line.split()[0] for line in lines] == classes
    assert [line.split()[-1] == "0" for line in lines] == [name in "37" for name in classes]
    metrics, (_, *rows) = read_metrics(tmp_path), read_csv(tmp_path / "predictions.csv")
    labels, predicted = np.array([row[1:3] for row in rows], int).T
    f1 = f1_score(labels, predicted, labels=np.unique(labels), average="macro")
    assert metrics["macro_f1"] == pytest.approx(f1)
    assert metrics["classes_without_images"] == ["3", "7"]
    assert "note     2 of 10 classes have no test image: macro F1 leaves" in capsys.readouterr().out


def test_processes_of_torchrun_after_the_first_do_nothing(tmp_path, monkeypatch, capsys):
    for name, value in torchrun_environment(rank=1).items():
        monkeypatch.setenv(name, value)
    run_main("nowhere/best.pt", tmp_path / "results")
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


# ---- unlucky names ------------------------------------------------------------------------------

UNLUCKY = ["a$b_$c", "accuracy", "macro avg", "weighted avg", "micro avg", "\u4e2d\u6587", "a\tb"]
UNLUCKY += ["Latin-1: \udce9", "$", "{0} %s"]  # a folder whose name is not UTF-8; braces


@pytest.fixture(scope="module")
def unlucky(checkpoint, tmp_path_factory):
    """A checkpoint whose classes have unlucky names, and the results of its evaluation."""
    folder = tmp_path_factory.mktemp("unlucky")
    utils.save_checkpoint(folder / "best.pt", torch.load(checkpoint) | {"classes": UNLUCKY})
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        rename_digits(patch)
        warnings.simplefilter("error")
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as stderr:
            run_main(folder / "best.pt", folder / "before", "--no-show")
            compare = ["--no-show", "--compare", folder / "before"]
            run_main(folder / "best.pt", folder / "results", *compare)
    assert not stderr.getvalue()
    return folder


def rename_digits(patch):
    read = data.read_digits
    patch.setattr(data, "read_digits", lambda part: (read(part)[0], UNLUCKY))


def test_every_table_and_picture_is_made_whatever_the_classes_are_called(unlucky):
    assert {path.name for path in (unlucky / "results").iterdir()} == {
        *TABLES, *PICTURES, "comparison.png"
    }  # fmt: skip
    options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with open(unlucky / "results" / "classification_report.csv", **options) as file:
        _, *rows = csv.reader(file)
    _, *images = read_csv(unlucky / "results" / "predictions.csv")
    pairs = np.array([row[1:3] for row in images], int).T
    expected = np.array(precision_recall_fscore_support(*pairs, labels=range(10))).T
    assert [name for name, *_ in rows] == UNLUCKY
    np.testing.assert_allclose(np.array([row[1:] for row in rows], float), expected)
    changes = read_metrics(unlucky / "results")["comparison"]["classes"]
    assert sorted(row["class"] for row in changes) == sorted(UNLUCKY)


def test_output_that_cannot_show_a_name_loses_no_file(unlucky, pictures, monkeypatch):
    rename_digits(monkeypatch)
    (pictures / "folder" / "digit.png").rename(pictures / "folder" / "\u6587.png")
    for flags, files in (
        ([], TABLES | PICTURES),
        (["--images", pictures / "folder"], {"pictures.csv", "predictions.png"}),
    ):
        results = pictures / f"{len(files)}"
        with redirect_stdout(TextIOWrapper(BytesIO(), "ascii")), suppress(UnicodeEncodeError):
            run_main(unlucky / "best.pt", results, "--no-show", *flags)
        assert {path.name for path in results.iterdir()} == files


def test_letters_come_from_any_installed_font_or_are_escaped(tmp_path, monkeypatch):
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "wen"])
    font.setupCharacterMap({ord("\u6587"): "wen"})
    font.setupGlyf(dict.fromkeys([".notdef", "wen"], TTGlyphPen(None).glyph()))
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", "wen"], (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Only Wen", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "wen.ttf")
    with plt.rc_context():
        assert evaluate.legible(["a\u6587", "\u4e2d\u6587"]) == [r"a\u6587", r"\u4e2d\u6587"]
        installed = list(font_manager.fontManager.ttflist)
        monkeypatch.setattr(font_manager.fontManager, "ttflist", installed)
        font_manager.fontManager.addfont(tmp_path / "wen.ttf")
        texts = evaluate.legible(["a\u6587", "\u4e2d\u6587"])
        assert texts == ["a\u6587", "\\u4e2d\u6587"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns of letters that it draws as boxes
            evaluate.new_figure(3, 3).text(0, 0, texts[1]).figure.canvas.draw()


# ---- curves -------------------------------------------------------------------------------------

COLUMNS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")


@pytest.mark.parametrize("epochs", [1, 2, 30, 300])
def test_curves_are_over_whole_epochs(epochs):
    history = [{"epoch": e} | dict.fromkeys(COLUMNS, 0.5 / e) for e in range(1, epochs + 1)]
    figure = utils.draw_curves(history, "loss")
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [epochs, epochs, 1]
        ticks = [label.get_text() for label in axes.get_xticklabels()]
        assert all(tick.lstrip("−").isdigit() for tick in ticks), ticks
    for axes in figure.axes:
        for label in axes.get_yticklabels(which="both"):
            assert not {"e", "$"} & set(label.get_text())  # 0.006, neither 6e-03 nor mathematics


def test_curves_name_what_selected_the_best_epoch_and_what_was_augmented():
    """By loss it is epoch 1, by accuracy epoch 2."""
    losses, accuracies = [0.9, 0.4, 0.5], [0.5, 0.7, 0.8]
    names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "learning_rate")
    history = [
        {"epoch": epoch} | dict(zip(names, (loss, loss, accuracy, accuracy, 0.1)))
        for epoch, (loss, accuracy) in enumerate(zip(losses, accuracies))
    ]
    for rows, watch, best, training in [
        (history, "loss", 1, "training, augmented from epoch 1"),
        (history[1:], "accuracy", 2, "training, augmented"),
    ]:
        figure = utils.draw_curves(rows, watch)
        for axes, values in zip(figure.axes, (losses, accuracies)):
            lines = {line.get_label(): line for line in axes.get_lines()}
            star = lines[f"best epoch by validation {watch}: {best}"]
            assert star.get_xydata().tolist() == [[best, values[best]]]
            assert training in lines


# ---- the user's own pictures --------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder with a test digit as a PNG, a text file, and another digit in a folder of its own.

    A broken JPEG is beside it.
    """
    for index, name in enumerate(["digit.png", "inner/deep/digit.png"]):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True)
        digit = data.read_digits("test")[0].images[index].permute(1, 2, 0).numpy()
        Image.fromarray(digit).save(path)
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    return tmp_path


def test_pictures_are_classified_as_the_evaluation_does(checkpoint, results, pictures):
    flags = ["--checkpoint", checkpoint, "--results-dir", pictures / "results", "--tta"]
    flags += ["--images", pictures / "folder", pictures / "broken.jpg"]
    run = run_script(*flags, backend="module://nowhere")  # a window that cannot be had
    assert run.returncode == 0, run.stderr
    assert "no window: No module named 'nowhere'" in run.stdout
    lines, rows = run.stdout.splitlines(), read_csv(results / "predictions.csv")[1:]
    names = ["digit.png", "inner/deep/digit.png"]
    for name, (_, _, predicted, confidence) in zip(names, rows):
        top5 = lines[lines.index(str(pictures / "folder" / name)) + 1 :][:5]
        shares = [float(line.split()[0]) for line in top5]
        assert shares == sorted(shares, reverse=True)
        assert top5[0].split()[2] == predicted
        assert shares[0] == pytest.approx(100 * float(confidence), abs=1)  # bf16, another batch
    assert [line.split(": ")[0] for line in run.stderr.splitlines()] == [
        f"skipped  {pictures / 'folder' / 'notes.txt'}",
        f"skipped  {pictures / 'broken.jpg'}",
    ]
    with Image.open(pictures / "results" / "predictions.png") as picture:
        assert min(picture.size) > 250


def test_no_picture_at_all_is_one_message(pictures):
    with pytest.raises(data.DataError, match="No picture among .*broken.jpg"):
        data.read_pictures([str(pictures / "broken.jpg")], 32)


def test_a_photo_is_cropped_to_its_centre(tmp_path):
    stripes = np.zeros((64, 192, 3), np.uint8)
    for channel in range(3):
        stripes[:, 64 * channel : 64 * (channel + 1), channel] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    _, images = data.read_pictures([str(tmp_path / "stripes.png")], 32)
    assert images.shape == (1, 3, 32, 32)
    assert images[0].float().mean((1, 2)).tolist() == pytest.approx([0, 255, 0], abs=2)


# ---- windows ------------------------------------------------------------------------------------


def test_a_window_opens_where_there_is_a_display_unless_no_show(
    checkpoint, pictures, monkeypatch, capsys
):
    (pictures / "recorder.py").write_text(
        "from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvas\n"
        "def show(*args, **kwargs): print('a window opens')\n"
    )
    monkeypatch.syspath_prepend(pictures)
    flags = [checkpoint, pictures / "results", "--images", pictures / "folder"]
    plt.switch_backend("module://recorder")
    try:
        run_main(*flags)
        assert "a window opens" in capsys.readouterr().out
        run_main(*flags, "--no-show")
        assert "a window opens" not in capsys.readouterr().out
    finally:
        plt.switch_backend("agg")
