"""evaluate.py --compare: its statistics by hand and by naive loops, its files, and bad input."""

import csv
import json
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, run_script
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

import data
import evaluate
import model as resnet
import utils

FILES = ("metrics.json", "predictions.csv")


@pytest.fixture(scope="module")
def checkpoints(finished_run, tmp_path_factory) -> list[Path]:
    """Two networks whose last layers scikit-learn fitted to 60 and to 300 digits; in float32."""
    state, (train, classes) = torch.load(finished_run / "demo/best.pt"), data.read_digits("train")
    folder, state["precision"] = tmp_path_factory.mktemp("fitted"), "fp32"
    model = resnet.build_model("resnet50", len(classes))
    model.load_state_dict(state["model"])
    loader = data.EvalLoader(train.images[:300], 100, 32)
    with torch.no_grad():
        features = resnet.extract_features(model, loader, torch.float32)
        features = model.fc[0](features).relu()
        # Those of a hardly trained network are almost equal: the solver needs them standardized.
        mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
        for count in (60, 300):
            fit = LogisticRegression(C=1e4, max_iter=1000).fit(
                (features[:count] - mean) / scale, train.labels[:count]
            )
            model.fc[3].weight.copy_(torch.from_numpy(fit.coef_) / scale)
            model.fc[3].bias.copy_(
                torch.from_numpy(fit.intercept_) - model.fc[3].weight.double() @ mean.double()
            )
            state["model"] = model.state_dict()
            state["constants"]["learning_rate"] = count / 1000
            utils.save_checkpoint(folder / f"{count}.pt", state)
    return [folder / "60.pt", folder / "300.pt"]


def run_main(checkpoint: Path, folder: Path, *flags: object) -> tuple[Path, str]:
    """Evaluates in this process; returns the results folder and what was printed."""
    flags = ["--checkpoint", checkpoint, "--results-dir", folder, "--no-show", *flags]
    with redirect_stdout(StringIO()) as output:
        evaluate.main(list(map(str, flags)))
    return folder, output.getvalue()


@pytest.fixture(scope="module")
def before(checkpoints, tmp_path_factory) -> Path:
    """The results of the first network, where an earlier comparison had left its picture."""
    folder = tmp_path_factory.mktemp("before")
    (folder / "comparison.png").write_text("of an earlier evaluation")
    return run_main(checkpoints[0], folder)[0]


@pytest.fixture(scope="module")
def after(checkpoints, before, tmp_path_factory) -> tuple[Path, str]:
    """The results of the second network, compared with the first, and what was printed."""
    return run_main(checkpoints[1], tmp_path_factory.mktemp("after"), "--compare", before)


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def read_predictions(folder: Path) -> list[dict]:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- statistics ---------------------------------------------------------------------------------


def test_difference_and_mcnemar_of_a_hand_worked_case():
    # Of ten images, three are right in this one only, one in the other only, five in both.
    this = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 0], bool)
    other = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 0], bool)
    paired = evaluate.compare_paired(this, other)
    assert (paired["only_this_correct"], paired["only_other_correct"]) == (3, 1)
    assert paired["difference"] == pytest.approx(0.2)
    # Of 16 ways that four coins fall, 2 * (1 + 4) are at least as uneven as 3 to 1.
    assert paired["mcnemar_p"] == pytest.approx(10 / 16)


def test_networks_that_are_right_on_the_same_images_do_not_differ():
    correct = np.array([True, False, True])
    paired = evaluate.compare_paired(correct, correct)
    assert paired["difference_interval_95"] == [0, 0] and paired["mcnemar_p"] == 1


def test_pairing_narrows_the_interval_as_the_normal_approximation_predicts():
    # 10,000 images, 85 % right in both evaluations, 9 % of them in only one of the two.
    this, other = np.arange(10_000) < 8500, np.arange(10_000) < 8500
    this[:450], other[8500:8950] = False, False
    other[:450], this[8500:8950] = True, True
    low, high = evaluate.compare_paired(this, other)["difference_interval_95"]
    paired, independent = 1.96 * (0.09 / 10_000) ** 0.5, 1.96 * (2 * 0.85 * 0.15 / 10_000) ** 0.5
    assert (low, high) == pytest.approx((-paired, paired), abs=0.0003)
    assert (100 * paired, 100 * independent) == pytest.approx((0.59, 0.99), abs=0.005)


def test_interval_holds_the_true_difference_in_95_of_100_simulated_pairs():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):  # both right, only this, only the other, both wrong
        kind = rng.choice(4, size=2000, p=[0.78, 0.06, 0.04, 0.12])
        paired = evaluate.compare_paired(kind <= 1, kind % 2 == 0)
        low, high = paired["difference_interval_95"]
        inside += low <= 0.02 <= high
    assert 0.91 <= inside / 200 <= 0.99


# ---- two evaluations ----------------------------------------------------------------------------


def test_naive_loops_over_two_predictions_files_find_the_same_numbers(before, after):
    rows = list(zip(read_predictions(after[0]), read_predictions(before)))
    only_this = only_other = 0
    for this, other in rows:
        assert (this["index"], this["label"]) == (other["index"], other["label"])
        right, other_right = (row["predicted"] == row["label"] for row in (this, other))
        only_this += right and not other_right
        only_other += other_right and not right
    comparison = read_metrics(after[0])["comparison"]
    assert comparison["only_this_correct"] == only_this > 5
    assert comparison["only_other_correct"] == only_other > 5
    assert comparison["difference"] == pytest.approx((only_this - only_other) / 360)
    accuracies = [read_metrics(folder)["top1_accuracy"] for folder in (after[0], before)]
    assert comparison["difference"] == pytest.approx(accuracies[0] - accuracies[1])
    low, high = comparison["difference_interval_95"]
    assert low < comparison["difference"] < high


def test_changes_of_the_classes_are_those_of_scikit_learns_f1(before, after):
    columns = []
    for folder in (after[0], before):
        rows = read_predictions(folder)
        columns.append([[int(row[name]) for row in rows] for name in ("label", "predicted")])
    f1, other_f1 = (f1_score(*pair, average=None) for pair in columns)
    classes = read_metrics(after[0])["comparison"]["classes"]
    assert len(classes) == 10
    for row in classes:
        number = int(row["class"])
        assert row["f1_change"] == pytest.approx(f1[number] - other_f1[number])
        hits = [sum(a == b == number for a, b in zip(*pair)) for pair in columns]
        assert [row["correct"], row["other_correct"]] == hits
    changes = [row["f1_change"] for row in classes]
    assert changes == sorted(changes, reverse=True)


def test_every_number_is_printed_with_what_it_is(before, after):
    comparison, printed = read_metrics(after[0])["comparison"], after[1]
    accuracies = [100 * read_metrics(x)["top1_accuracy"] for x in (before, after[0])]
    low, high = (100 * x for x in comparison["difference_interval_95"])
    counts = comparison["only_other_correct"], comparison["only_this_correct"]
    for line in [
        f"compared with {before}: ",
        "top-1    other {:.2f} %, this {:.2f} %\n".format(*accuracies),
        f"change   {accuracies[1] - accuracies[0]:+.2f} points, paired 95 % interval",
        f" {low:+.2f} to {high:+.2f} points\n",
        "images   {} correct only in the other, {} only in this; ".format(*counts),
        "differs  LEARNING_RATE: other 0.06, this 0.3\n",
        "caution  ",
    ]:
        assert line in printed
    assert printed.count("differs") == 1
    assert printed.index("macro F1") < printed.index("compared")


def test_a_results_folder_holds_the_runs_constants_and_history(before, checkpoints):
    metrics, state = read_metrics(before), torch.load(checkpoints[0])
    assert metrics["constants"] == state["constants"]
    assert metrics["history"] == state["history"]


def test_views_and_hold_out_that_differ_are_noted_and_a_younger_constant_is_off(before, capsys):
    this, other = read_metrics(before), read_metrics(before)
    this["tta"], other["constants"]["holdout_per_class"] = True, 5
    held_out = this["constants"]["holdout_per_class"]
    other["constants"]["checkpoint_dir"] = "where it is kept changes nothing"
    other["constants"] = utils.with_defaults(other)
    predicted = np.array([int(row["predicted"]) for row in read_predictions(before)])
    logits = torch.eye(10)[torch.from_numpy(predicted)]
    result = evaluate.Result(data.read_digits("test")[0], logits[None], list("0123456789"))
    other |= {"predicted": predicted, "results_dir": "before"}
    this["comparison"] = evaluate.compare(result, this, other)
    assert this["comparison"]["different_constants"] == {
        "tta": {"other": False, "this": True},
        "holdout_per_class": {"other": 5, "this": held_out},
    }
    evaluate.print_comparison(this)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines if line.startswith("differs")] == [
        "differs  TTA: other False, this True",
        f"differs  HOLDOUT_PER_CLASS: other 5, this {held_out}",
    ]


def test_an_evaluation_without_compare_removes_an_earlier_comparison(before):
    assert not (before / "comparison.png").exists()
    assert "comparison" not in read_metrics(before)


# ---- the picture --------------------------------------------------------------------------------


def draw(changes: list[float], epochs: int) -> dict:
    """The panels of comparison.png for invented changes of F1 and equal histories."""
    classes = [{"class": str(i), "f1_change": change} for i, change in enumerate(changes)]
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    history = [{"epoch": e} | dict.fromkeys(names, 0.5 / e) for e in range(1, epochs + 1)]
    comparison = {"classes": classes, "other": {"history": history}}
    names = {row["class"]: row["class"] for row in classes}
    figure = evaluate.draw_comparison({"history": history, "comparison": comparison}, names)
    figure.canvas.draw()
    return dict(zip(("f1", "loss", "accuracy"), figure.axes))


def test_picture_shows_the_15_largest_changes_each_way():
    changes = np.linspace(0.3, -0.5, 100).round(3).tolist()
    bars = [bar.get_width() for bar in draw(changes, 3)["f1"].patches]
    assert bars == changes[:15] + changes[-15:]
    bars = [bar.get_width() for bar in draw([0.2, 0.1, 0.0, 0.0, -0.1], 3)["f1"].patches]
    assert bars == [0.2, 0.1, -0.1]


def test_picture_says_that_no_class_has_changed():
    panel = draw([0.0] * 100, 3)["f1"]
    assert panel.get_title() == "no class has changed" and not len(panel.patches)


@pytest.mark.parametrize("epochs", [1, 2, 30, 300])
def test_picture_has_both_runs_curves_over_whole_epochs(epochs):
    panels = draw([0.1], epochs)
    for name in ("loss", "accuracy"):
        lines = {line.get_label(): line for line in panels[name].get_lines()}
        assert {label.split(":")[0] for label in lines} == {"this", "other"} and len(lines) == 4
        assert all(len(line.get_xdata()) == epochs for line in lines.values())
        ticks = [label.get_text() for label in panels[name].get_xticklabels()]
        assert all(tick.lstrip("−").isdigit() for tick in ticks), ticks
    for label in panels["loss"].get_yticklabels(which="both"):
        assert "e" not in label.get_text()  # 0.006, not 6e-03


def test_picture_is_written(after):
    with Image.open(after[0] / "comparison.png") as picture:
        picture.load()
        assert min(picture.size) > 600


# ---- bad input ----------------------------------------------------------------------------------


def cut_last_row(folder: Path) -> None:
    text = (folder / "predictions.csv").read_text()
    (folder / "predictions.csv").write_text(text[: text.rindex("\n", 0, -1) + 1])


def edit(name: str, old: str, new: str):
    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return apply


def spoil_a_prediction(folder: Path) -> None:
    """Turns one correct prediction into a wrong one."""
    rows = read_predictions(folder)
    row = next(row for row in rows if row["label"] == row["predicted"])
    old = "{index},{label},{predicted},".format(**row)
    wrong = (int(row["label"]) + 1) % 10
    edit("predictions.csv", f"\n{old}", f"\n{row['index']},{row['label']},{wrong},")(folder)


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def classifier(checkpoints) -> evaluate.Classifier:
    flags = ["--checkpoint", str(checkpoints[0])]
    return evaluate.Classifier(utils.parse_flags(evaluate.__file__, flags))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), "metrics.json .* No such file"),
        (lambda folder: (folder / "predictions.csv").unlink(), "predictions.csv .* No such file"),
        (cut_last_row, "it has 359 images, not 360"),
        (write("predictions.csv", b""), "it has 0 images, not 360"),
        (write("predictions.csv", b"\xff\xfe\x00"), "it has 0 images, not 360"),
        (edit("predictions.csv", "\n7,", "\n8,"), "its labels are not those of the test images"),
        (edit("predictions.csv", "\n7,", "\nx,"), "could not convert string 'x'"),
        (edit("predictions.csv", "\n9,", "\n9\n"), "it has 361 images"),
        (spoil_a_prediction, "its accuracy is not that of metrics.json"),
        (write("metrics.json", b""), "metrics.json .* Expecting value"),
        (write("metrics.json", b"[]"), "metrics.json cannot be compared"),
        (write("metrics.json", b'{"loss": 1}'), "it has no 'dataset'"),
        (edit("metrics.json", '"history"', '"story"'), "it has no 'history'"),
        (edit("metrics.json", '"val_loss"', '"lost"'), "it has no 'val_loss'"),
        (
            edit("metrics.json", '"digits"', '"cifar100"'),
            "its data set is 'cifar100', not 'digits'",
        ),
        (edit("metrics.json", '"constants": {', '"constants": 3, "_": {'), "cannot be compared"),
    ],
)
def test_files_that_cannot_be_compared_are_one_line(classifier, before, tmp_path, spoil, reason):
    for name in FILES:
        (tmp_path / name).write_bytes((before / name).read_bytes())
    args = Namespace(compare=str(tmp_path), results_dir=str(tmp_path / "results"))
    test = evaluate.TestImages(data.read_digits("test")[0], "digits", selected=False)
    assert evaluate.read_results(args, test)["dataset"] == "digits"
    spoil(tmp_path)
    with redirect_stderr(StringIO()) as stderr, pytest.raises(utils.UserError, match=reason) as end:
        evaluate.read_results(args, test)
    assert "\n" not in str(end.value) and "evaluate that checkpoint again" in str(end.value)
    assert not stderr.getvalue()


def test_a_shorter_file_is_refused_before_the_network_runs(
    checkpoints, before, tmp_path, monkeypatch
):
    for name in FILES:
        (tmp_path / name).write_bytes((before / name).read_bytes())
    cut_last_row(tmp_path)
    monkeypatch.setattr(resnet, "predict", None)  # which a call of the network would hit
    with pytest.raises(utils.UserError, match="it has 359 images, not 360"):
        run_main(checkpoints[0], tmp_path / "results", "--compare", tmp_path)
    assert not list((tmp_path / "results").iterdir())


def test_a_folder_that_is_not_there_ends_the_script_with_status_1(checkpoints, tmp_path):
    flags = ["--checkpoint", str(checkpoints[0]), "--compare", "nowhere", "--no-show"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path)
    assert script.status == 1
    assert script.stderr.startswith("nowhere/metrics.json cannot be compared: No such file")
    assert script.stderr.count("\n") == 1


def test_the_folder_that_is_written_cannot_be_compared_with(checkpoints, before, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(checkpoints[0], before, "--compare", before / ".." / before.name)
    assert end.value.code == 2
    assert "expected another folder than --results-dir" in capsys.readouterr().err


# ---- the user's own pictures; best.pt elsewhere -------------------------------------------------


@pytest.fixture
def photo(tmp_path) -> Path:
    """A test digit as photo.jpg, enlarged to 96 px."""
    digit = Image.fromarray(data.read_digits("test")[0].images[3].permute(1, 2, 0).numpy())
    digit.resize((96, 96)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_pictures_csv_has_what_is_printed(checkpoints, photo):
    flags = ["--images", photo, photo]
    folder, printed = run_main(checkpoints[1], photo.parent / "results", *flags)
    with open(folder / "pictures.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == second and first.pop("file") == str(photo)
    assert list(first)[:3] == ["class_1", "probability_1", "class_2"] and len(first) == 10
    shares = [float(first[f"probability_{rank}"]) for rank in range(1, 6)]
    assert shares == sorted(shares, reverse=True) and 0.99 < sum(shares) <= 1.0001
    lines = printed.splitlines()[printed.splitlines().index(str(photo)) + 1 :][:5]
    assert [line.split() for line in lines] == [
        [f"{100 * share:.2f}", "%", first[f"class_{rank}"]] for rank, share in enumerate(shares, 1)
    ]


def test_readme_snippet_classifies_without_this_repo_as_evaluate_does(checkpoints, photo):
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    snippet = next(block for block in blocks if "best.pt" in block)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 8
    folder = photo.parent
    state = torch.load(checkpoints[1])
    state["constants"]["image_size"] = 48  # so that the image must be enlarged
    (folder / "checkpoints").mkdir()
    utils.save_checkpoint(folder / "checkpoints" / "best.pt", state)

    code = snippet + "print(model(image[None]).softmax(1).max().item())"
    command = [sys.executable, "-I", "-c", code]  # -I: nothing of this repo can be imported
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    name, probability = run.stdout.splitlines()
    results, _ = run_main(folder / "checkpoints" / "best.pt", folder / "r", "--images", photo)
    with open(results / "pictures.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert name == row["class_1"]
    assert float(probability) == pytest.approx(float(row["probability_1"]), abs=0.01)
