"""evaluate.py: its numbers by hand or by other sources, and the script end to end on digits."""

import base64
import csv
import re
import shutil
import sys
import tracemalloc
import warnings
from contextlib import redirect_stdout, suppress
from io import BytesIO, StringIO, TextIOWrapper

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import (
    load,
    read_json,
    read_predictions,
    run_script,
    torchrun_environment,
    without_bars,
)
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

import data
import evaluate
import model as resnet
import utils

FILES = "metrics.json confusion_matrix.csv predictions.csv classification_report.txt "
FILES += "classification_report.csv confusion_matrix.png report.html"
FILES = set(FILES.split())


@pytest.fixture(scope="module")
def checkpoint(finished_run, tmp_path_factory):
    """A tiny run's, its last layer fitted by scikit-learn: right and wrong in many ways."""
    state = load(finished_run / "demo" / "best.pt")
    model = resnet.build_model("resnet18", 10)
    model.load_state_dict(state["model"])
    for module in model.modules():
        module.momentum = 1.0  # batch norm takes the statistics of the next batch
    digits, _ = data.read_digits("train")
    images, labels = digits.images[:300], digits.labels[:300]
    loader = data.EvalLoader(images, 300, 32)
    with torch.no_grad():
        model.train()(*loader)
        features = resnet.extract_features(model, loader, torch.float32)
        inputs = model.fc[1](model.fc[0](features))
    state["model"] = model.state_dict()
    fit = LinearDiscriminantAnalysis("lsqr", "auto").fit(inputs, labels)
    state["model"]["fc.3.weight"] = torch.from_numpy(fit.coef_).float()
    state["model"]["fc.3.bias"] = torch.from_numpy(fit.intercept_).float()
    path = tmp_path_factory.mktemp("fitted") / "best.pt"
    utils.save_checkpoint(path, state)
    return path


@pytest.fixture(scope="module")
def evaluation(checkpoint, tmp_path_factory):
    """The results with --tta, in the folder of an earlier evaluation, and what was printed."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("superclass_confusion_matrix.png", "mistakes.png", "metrics.json"):
        (folder / name).write_text("of another network")
    with redirect_stdout(StringIO()) as output:
        run_main(checkpoint, folder, "--tta")
    return folder, output.getvalue()


def run_main(checkpoint, folder, *flags):
    evaluate.main(["--checkpoint", str(checkpoint), "--results-dir", str(folder), *map(str, flags)])


def read_csv(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def as_result(labels, predicted, classes, confidence=1.0):
    confidence = np.broadcast_to(confidence, len(labels))
    return evaluate.Result(classes, np.array(labels), np.array(predicted), confidence, "", {})


# ---- numbers ------------------------------------------------------------------------------------


def test_scores_of_classes_are_those_of_scikit_learn():
    labels, predicted = np.random.default_rng(2).integers(7, size=(2, 200))
    labels[labels > 4] = 0  # 5 and 6 are never true
    predicted[(predicted == 4) | (predicted == 6)] = 0  # 4 and 6 are never predicted
    result = as_result(labels, predicted, list("abcdefg"))
    expected = precision_recall_fscore_support(labels, predicted, labels=range(7), zero_division=0)
    np.testing.assert_allclose([*result.scores, result.support], expected)
    assert result.worst_first.tolist() == np.argsort(expected[2][:5]).tolist()


def test_confused_pairs_add_up_both_ways_and_name_the_commoner():
    labels, predicted = [0] * 6 + [1] * 10 + [2] * 7, [0] * 5 + [1] + [0] * 3 + [1] * 5 + [2] * 2
    result = as_result(labels, [*predicted, 1, 1, *[2] * 5], ["a", "b", "c"])
    assert evaluate.count_matrix(result).tolist() == [[5, 1, 0], [3, 5, 2], [0, 2, 5]]
    assert result.pairs == [
        {"true": "b", "taken_for": "a", "images": 3, "other_way": 1},
        {"true": "b", "taken_for": "c", "images": 2, "other_way": 2},
    ]
    assert as_result([0, 1, 1], [0, 1, 1], ["a", "b"]).pairs == []


def test_calibration_agrees_with_hand_worked_cases():
    # Four at 0.95, three right: a gap of 0.2 for 4/5 of the images; one right at 0.55: 0.45.
    result = as_result([0] * 5, [0, 0, 0, 1, 0], ["a", "b"], [0.95] * 4 + [0.55])
    *_, error = evaluate.calibrate(result)
    assert error == pytest.approx(0.8 * 0.2 + 0.2 * 0.45)
    images, _, _ = evaluate.calibrate(as_result([0] * 4, [0] * 4, ["a", "b"], [0, 0.2, 0.21, 1]))
    assert np.flatnonzero(images).tolist() == [0, 2, 3, 14]  # 0.2 is the third of 15 bins' end


def test_interval_of_accuracy_agrees_with_the_normal_approximation():
    cells = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [4000, 1000, 1000, 4000]])
    low, high = evaluate.bootstrap_intervals(cells, 2)["top1_accuracy"]
    sigma = (0.8 * 0.2 / 10_000) ** 0.5
    assert (low, high) == pytest.approx((0.8 - 1.96 * sigma, 0.8 + 1.96 * sigma), abs=0.0008)


def test_interval_of_macro_f1_agrees_with_resampled_images():
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=300)
    predicted = np.where(rng.random(300) < 0.7, labels, rng.integers(3, size=300))
    draws = rng.integers(300, size=(300, 300))
    naive = [f1_score(labels[draw], predicted[draw], average="macro") for draw in draws]
    expected = pytest.approx(np.percentile(naive, [2.5, 97.5]), abs=0.012)
    cells = evaluate.count_cells(labels, predicted)
    for classes in (3, 4):  # the fourth has no images
        assert evaluate.bootstrap_intervals(cells, classes)["macro_f1"] == expected


def test_memory_does_not_grow_with_the_square_of_10000_classes():
    """Every array of this many classes would have 100 million cells: 800 MB."""
    labels = np.arange(0, 10_000, 2)
    predicted = np.where(labels % 3, labels, labels + 1)
    tracemalloc.start()
    result = as_result(labels, predicted, [str(i) for i in range(10_000)])
    low, high = evaluate.bootstrap_intervals(result.cells, 10_000, resamples=20)["top1_accuracy"]
    name, *row = next(evaluate.list_matrix_rows(result))
    matrix = evaluate.count_matrix(result, per_cell=10)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert low < result.correct.mean() < high and most < 100e6
    assert (name, len(row), row[:2], sum(row)) == ("0", 10_000, [0, 1], 1)
    assert matrix.shape == (1000, 1000) and matrix.sum() == 5000
    assert len(result.pairs) == 1667 and result.pairs[0]["taken_for"] == "1"


# ---- the script ---------------------------------------------------------------------------------


def test_predictions_recompute_top1_and_the_matrix_with_the_official_labels(evaluation):
    folder, _ = evaluation
    official = data.read_digits("test")[0].labels.tolist()
    rows = read_predictions(folder)
    labels, predicted = rows["label"], rows["predicted"]
    assert [row[0] for row in read_csv(folder / "predictions.csv")[1:]] == [*map(str, range(360))]
    assert labels.tolist() == official
    header, *table = read_csv(folder / "predictions.csv")
    assert header == ["index", "label", "predicted", "confidence", "class", "predicted_class"]
    assert [row[4:] for row in table] == [row[1:3] for row in table]  # digits: 7 is called 7
    figures = read_json(folder / "metrics.json")
    assert figures["top1_accuracy"] == np.mean(predicted == official)
    assert (figures["images"], figures["epoch"], figures["dataset"]) == (360, 1, "digits")
    header, *rows = read_csv(folder / "confusion_matrix.csv")
    assert header[1:] == [name for name, *_ in rows] == list("0123456789")
    counts = np.array([row[1:] for row in rows], int)
    assert (counts == confusion_matrix(official, predicted)).all()


def test_an_evaluation_leaves_its_own_files_alone_and_says_what_to_mind(evaluation):
    folder, output = evaluation
    assert names_in(folder) == FILES
    assert "nothing to draw" not in output
    assert "note     trained with FLIP = 0: mirror images may lower the accuracy" in output
    assert "these images were used neither to train nor to select the checkpoint" in output
    assert read_json(folder / "metrics.json")["test_images_chose_checkpoint"] is False


def test_tta_averages_logits_over_image_and_mirror_and_holds_the_images_once(
    checkpoint, evaluation, monkeypatch
):
    folder, output = evaluation
    state, (test, _) = load(checkpoint), data.read_digits("test")
    model = resnet.build_model("resnet18", 10).to(memory_format=torch.channels_last)
    model.load_state_dict(state["model"])
    plain, mirrored = (
        resnet.predict(model, data.EvalLoader(view, 64, 32), torch.float32)
        for view in (test.images, test.images.flip(3))
    )
    figures = read_json(folder / "metrics.json")
    for logits, found in (plain + mirrored, figures), (plain, figures["without_tta"]):
        accuracy = (logits.argmax(1) == test.labels).double().mean().item()
        assert found["top1_accuracy"] == pytest.approx(accuracy)
        assert f"{100 * accuracy:.2f} %" in output
    assert figures["top1_accuracy"] != figures["without_tta"]["top1_accuracy"]

    held = set()

    class Loader(data.EvalLoader):
        def __iter__(self):
            held.add(self.images.untyped_storage().data_ptr())
            return super().__iter__()

    monkeypatch.setattr(data, "EvalLoader", Loader)
    flags = ["--checkpoint", str(checkpoint), "--tta"]
    classifier = evaluate.Classifier(utils.parse_flags(evaluate.__file__, flags))
    views = classifier.predict(test.images[:70])
    torch.testing.assert_close(views, torch.stack([plain, mirrored])[:, :70], rtol=1e-4, atol=1e-4)
    assert len(held) == 1


def test_results_that_cannot_be_written_are_one_message_and_leave_the_earlier_ones_alone(
    checkpoint, evaluation, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match="file/results cannot be written: Not a directory"):
        run_main(checkpoint, tmp_path / "file" / "results")

    folder = shutil.copytree(evaluation[0], tmp_path / "results")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def savefig(self, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.Figure, "savefig", savefig)
    with pytest.raises(utils.UserError, match="cannot be written: No space left on device"):
        run_main(checkpoint, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_page_shows_the_curves_that_training_has_drawn(checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "best.pt")
    for curves in (b"", b"drawn by training"):
        if curves:
            (tmp_path / "training_curves.png").write_bytes(curves)
        run_main(tmp_path / "best.pt", tmp_path / "results")
        page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
        shown = re.findall(r'"curves": "data:image/png;base64,(.*?)"', page)
        assert shown == ([base64.b64encode(curves).decode()] if curves else [])


def test_processes_of_torchrun_after_the_first_do_nothing(tmp_path, monkeypatch, capsys):
    for name, value in torchrun_environment(rank=1).items():
        monkeypatch.setenv(name, value)
    run_main("nowhere/best.pt", tmp_path / "results")
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


# ---- unlucky names ------------------------------------------------------------------------------

UNLUCKY = ["a$b_$c", "accuracy", "macro avg", "weighted avg", "micro avg", "\u4e2d\u6587", "a\tb"]
UNLUCKY += ["Latin-1: \udce9", "#,$", "{0} %s"]  # a folder whose name is not UTF-8; braces


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_in_pictures_are_no_formulas_and_lose_only_bytes_that_are_no_letters():
    figure = evaluate.draw_matrix(np.eye(3, dtype=int), ["a$b_$c", "\u4e2d", "\udce9"])
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["a$b_$c", "\u4e2d", "?"]
    assert not any(label.get_parse_math() for label in labels)


def test_classes_may_have_any_name_and_no_test_images(
    checkpoint, tmp_path, savefig, monkeypatch, capsys
):
    unlucky, before, folder = (tmp_path / name for name in ("best.pt", "before", "results"))
    utils.save_checkpoint(unlucky, load(checkpoint) | {"classes": UNLUCKY})
    test, _ = data.read_digits("test")
    some = test.select((test.labels != 3) & (test.labels != 7))
    monkeypatch.setattr(data, "read_digits", lambda part: (some, UNLUCKY))
    with redirect_stdout(TextIOWrapper(BytesIO(), "ascii")), suppress(UnicodeEncodeError):
        run_main(unlucky, before)
    assert names_in(before) == FILES  # though the output cannot show a name
    coarse = {"dpi": 30}  # to be quick
    monkeypatch.setattr(evaluate.Figure, "savefig", lambda x, path, **_: savefig(x, path, **coarse))
    with warnings.catch_warnings(), redirect_stdout(StringIO()) as output:
        warnings.simplefilter("error")
        run_main(unlucky, folder, "--compare", before)
    assert "note     2 of 10 classes have no test image: macro F1 leaves" in output.getvalue()
    assert not without_bars(capsys.readouterr().err) and names_in(folder) == FILES

    rows = read_predictions(folder)
    labels, predicted = rows["label"], rows["predicted"]
    _, *rows = read_csv(folder / "classification_report.csv")
    scores = precision_recall_fscore_support(labels, predicted, labels=range(10), zero_division=0)
    assert [name for name, *_ in rows] == UNLUCKY
    np.testing.assert_allclose(np.array([row[1:] for row in rows], float), np.array(scores).T)
    report = (folder / "classification_report.txt").read_bytes().decode(errors="surrogateescape")
    for name, support, line in zip(UNLUCKY, scores[3], report.splitlines()[2:12]):
        assert line.strip().startswith(name) and line.endswith(f" {support}")
    _, *table = read_csv(folder / "predictions.csv")
    assert [row[4:] for row in table] == [[UNLUCKY[int(i)] for i in row[1:3]] for row in table]
    figures = read_json(folder / "metrics.json")
    f1 = f1_score(labels, predicted, labels=np.unique(labels), average="macro")
    assert figures["macro_f1"] == pytest.approx(f1)
    assert figures["classes_without_images"] == ["weighted avg", "Latin-1: \udce9"]
    changes = figures["comparison"]["classes"]
    assert sorted(row["class"] for row in changes) == sorted(UNLUCKY)


# ---- the user's own pictures --------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder with two test digits as PNGs and a text file; a broken JPEG is beside it."""
    for image, name in zip(data.read_digits("test")[0].images, ["digit.png", "inner/deep/2.png"]):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    return tmp_path / "folder"


def test_pictures_are_classified_as_the_evaluation_does(checkpoint, evaluation, pictures, tmp_path):
    flags = ["--checkpoint", str(checkpoint), "--tta", "--images", "folder", "broken.jpg"]
    run = run_script("evaluate.py", *flags, cwd=tmp_path)
    assert run.status == 0, run.stderr
    lines, rows = run.stdout.splitlines(), read_csv(evaluation[0] / "predictions.csv")[1:]
    for name, (_, _, predicted, confidence, *_) in zip(["digit.png", "inner/deep/2.png"], rows):
        best = lines[lines.index(f"folder/{name}") + 1].split()
        assert best[2] == predicted
        assert float(best[0]) == pytest.approx(100 * float(confidence), abs=0.02)
    assert [line.split(": ")[0] for line in run.stderr.splitlines()] == [
        "skipped  folder/notes.txt",
        "skipped  broken.jpg",
    ]


def test_no_picture_at_all_is_one_message(pictures, tmp_path):
    with pytest.raises(utils.UserError, match="No picture among .*broken.jpg"):
        list(data.read_pictures([str(tmp_path / "broken.jpg")], 32, False, 10))


def test_earlier_rows_stay_if_no_picture_can_be_read(checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "pictures.csv").write_text("of earlier pictures")
    with pytest.raises(utils.UserError, match="No picture among broken.jpg"):
        evaluate.main(["--checkpoint", str(checkpoint), "--images", "broken.jpg"])
    assert (tmp_path / "results" / "pictures.csv").read_text() == "of earlier pictures"


def test_pictures_are_read_in_batches_and_their_rows_written_at_once(
    checkpoint, pictures, tmp_path, monkeypatch
):
    digits = data.read_digits("test")[0].images
    for number in range(9):  # 11 pictures in all
        Image.fromarray(digits[number].permute(1, 2, 0).numpy()).save(pictures / f"{number}.png")
    folder, rows, state = tmp_path / "results", [], load(checkpoint)
    state["constants"]["val_batch_size"] = 4
    utils.save_checkpoint(tmp_path / "best.pt", state)
    predict = evaluate.Classifier.predict

    def predict_and_count(self, images):
        assert len(images) <= 4
        rows.append(len(read_csv(folder / "pictures.csv")))
        return predict(self, images)

    monkeypatch.setattr(evaluate.Classifier, "predict", predict_and_count)
    run_main(tmp_path / "best.pt", folder, "--images", pictures)
    assert rows == [1, 5, 9]  # with the header
    assert len(read_csv(folder / "pictures.csv")) == 12
    assert names_in(folder) == {"pictures.csv", "pictures.html"}


def write_ascii():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def test_output_that_cannot_show_the_name_of_a_picture_loses_no_file(
    checkpoint, pictures, tmp_path
):
    (pictures / "digit.png").rename(pictures / "\u6587.png")
    flags = ["--checkpoint", str(checkpoint), "--images", "folder"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path, prepare=write_ascii)
    assert script.status == 0 and "folder/\\u6587.png" in script.stdout
    assert names_in(tmp_path / "results") == {"pictures.csv", "pictures.html"}


def test_a_broken_pipe_is_not_blamed_on_the_results_folder(checkpoint, pictures, tmp_path):
    class Pipe(StringIO):
        def write(self, text):
            if "digit.png" in text:
                raise BrokenPipeError(32, "Broken pipe")
            return len(text)

    with redirect_stdout(Pipe()), pytest.raises(BrokenPipeError):
        run_main(checkpoint, tmp_path / "results", "--images", pictures)
    assert len(read_csv(tmp_path / "results" / "pictures.csv")) == 3


@pytest.mark.parametrize("name", ["model.tflite", "model", "model.pt", "model.PT2"])
def test_export_into_a_file_of_another_kind_is_refused(name, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        evaluate.main(["--export", name])
    message = f"--export '{name}': expected a name that ends in .pt2\n"
    assert capsys.readouterr().err.endswith(message)


def test_export_into_a_missing_folder_is_refused_before_the_network_runs(checkpoint, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        evaluate.main(["--checkpoint", str(checkpoint), "--export", "missing/model.pt2"])
    said = capsys.readouterr()
    assert said.err.endswith("--export 'missing/model.pt2': expected a folder that exists\n")
    assert said.out == ""
