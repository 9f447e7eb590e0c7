"""evaluate.py --compare: its statistics by hand and by naive loops, its files, and bad input."""

import csv
import json
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from scipy import stats
from scipy.special import ndtr, ndtri
from scripts import run_script
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

import data
import evaluate
import model as resnet
import utils

FILES = ("metrics.json", "predictions.csv", "confusion_matrix.csv")


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


# ---- statistics: one run each -------------------------------------------------------------------


def compare_runs(this: np.ndarray, other: np.ndarray) -> dict:
    return evaluate.compare_accuracies(this[None], other[None])


def test_difference_and_mcnemar_of_a_hand_worked_case():
    # Of ten images, three are right in this one only, one in the other only, five in both.
    this = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 0], bool)
    other = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 0], bool)
    paired = compare_runs(this, other)
    assert (paired["only_this_correct"], paired["only_other_correct"]) == (3, 1)
    assert paired["difference"] == pytest.approx(0.2)
    # Of 16 ways that four coins fall, 2 * (1 + 4) are at least as uneven as 3 to 1.
    assert paired["mcnemar_p"] == pytest.approx(10 / 16)


def test_networks_that_are_right_on_the_same_images_do_not_differ():
    correct = np.array([True, False, True])
    paired = compare_runs(correct, correct)
    assert paired["difference_interval_95"] == [0, 0] and paired["mcnemar_p"] == 1


def test_pairing_narrows_the_interval_as_the_normal_approximation_predicts():
    # 10,000 images, 85 % right in both evaluations, 9 % of them in only one of the two.
    this, other = np.arange(10_000) < 8500, np.arange(10_000) < 8500
    this[:450], other[8500:8950] = False, False
    other[:450], this[8500:8950] = True, True
    low, high = compare_runs(this, other)["difference_interval_95"]
    paired, independent = 1.96 * (0.09 / 10_000) ** 0.5, 1.96 * (2 * 0.85 * 0.15 / 10_000) ** 0.5
    assert (low, high) == pytest.approx((-paired, paired), abs=0.0003)
    assert (100 * paired, 100 * independent) == pytest.approx((0.59, 0.99), abs=0.005)


def test_interval_holds_the_true_difference_in_95_of_100_simulated_pairs():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):  # both right, only this, only the other, both wrong
        kind = rng.choice(4, size=2000, p=[0.78, 0.06, 0.04, 0.12])
        paired = compare_runs(kind <= 1, kind % 2 == 0)
        low, high = paired["difference_interval_95"]
        inside += low <= 0.02 <= high
    assert 0.91 <= inside / 200 <= 0.99


# ---- statistics: several seeds each -------------------------------------------------------------


def simulate(rng, seeds, images, seeds_sd, chance, recipe, difference=0.0):
    """Which images (seeds, images) the runs of two recipes have right: about 75 %.

    Each image has a score: one part that all runs share, one of the recipe and one, by chance, of
    the run; chance and recipe are the last two's shares of the variance. seeds_sd: standard
    deviation, from seed to seed, of the accuracy on infinitely many images.
    """
    shared = ndtri(0.75) + (1 - chance - recipe) ** 0.5 * rng.standard_normal(images)
    for mean in (0.75 + difference, 0.75):
        of_recipe = shared + recipe**0.5 * rng.standard_normal(images)
        accuracies = mean + seeds_sd * rng.standard_normal((seeds, 1))
        certain = of_recipe + ndtri(accuracies) - ndtri(0.75)
        yield rng.random((seeds, images)) < ndtr(certain / chance**0.5)


def simulate_comparisons(count, seeds, images, *mix, difference=0.0):
    """How often the interval holds the true difference, and how often it excludes zero."""
    rng, holds, found = np.random.default_rng(seeds), 0, 0
    for _ in range(count):
        comparison = evaluate.compare_accuracies(*simulate(rng, seeds, images, *mix, difference))
        low, high = comparison["difference_interval_95"]
        holds += low <= difference <= high
        found += low > 0
    return holds / count, found / count


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_interval_of_recipes_that_do_not_differ_holds_zero(seeds):
    holds, _ = simulate_comparisons(500, seeds, 1000, 0.005, 0.1, 0.05)
    assert 0.925 <= holds <= 0.975  # two standard errors around 95 %


# Accuracies spread by 0.2, 0.3 and 0.5 points over seeds; two runs of a recipe disagree on 7, 12
# and 12 % of the images, and the images add 0, 0.16 and 0.25 points to the difference's spread.
MIXES = [(0.001, 0.04, 0.0), (0.002, 0.12, 0.05), (0.004, 0.12, 0.15)]


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_interval_holds_the_truth_in_94_to_96_percent_of_1000_comparisons(seeds, mix):
    holds, found = simulate_comparisons(1000, seeds, 10_000, *mix)
    assert 0.94 - 0.014 <= holds <= 0.96 + 0.014  # two standard errors of 1,000
    _, found = simulate_comparisons(200, seeds, 10_000, *mix, difference=0.01)
    assert found > {2: 0.2, 3: 0.4, 5: 0.6}[seeds]


def test_difference_over_seeds_of_a_hand_worked_case():
    # Runs are right on 4 and 2 of 8 images, and on 3 and 1: means 3/8 and 2/8.
    this = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]], bool)
    other = np.array([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]], bool)
    comparison = evaluate.compare_accuracies(this, other)
    assert comparison["difference"] == pytest.approx(1 / 8)
    # Accuracies vary by 2 * (1/8)^2 per recipe, with 1 degree of freedom: 1/32. Images add less
    # than chance does, so the variance is 1/32 (1/2 + 1/2) with 2 degrees of freedom: t = 4.303.
    low, high = comparison["difference_interval_95"]
    assert (high - low) / 2 == pytest.approx(4.3027 / 32**0.5, rel=1e-4)
    assert comparison["more_seeds"] is None or comparison["more_seeds"] > 10


def test_more_seeds_are_as_many_as_settle_the_difference():
    """Accuracies 0.51, 0.49 against 0.485, 0.465 on images that all runs see alike."""
    rows = [np.arange(1000) < count for count in (510, 490, 485, 465)]
    comparison = evaluate.compare_accuracies(np.stack(rows[:2]), np.stack(rows[2:]))
    low, high = comparison["difference_interval_95"]
    assert low < 0 < high
    n = 2 + comparison["more_seeds"]
    width, narrower = (stats.t.ppf(0.975, 2 * m - 2) * (2 * 0.0002 / m) ** 0.5 for m in (n - 1, n))
    assert narrower < 0.025 < width


def test_runs_of_equal_accuracy_have_an_interval_all_the_same():
    rows = np.stack([np.roll(np.arange(100) < 50, shift) for shift in (0, 10, 20, 30)])
    low, high = evaluate.compare_accuracies(rows[:2], rows[2:])["difference_interval_95"]
    assert low < -0.05 and high > 0.05


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
    this, other = evaluate.read_result(str(before)), evaluate.read_result(str(before))
    this.summary["tta"], other.summary["constants"]["holdout_per_class"] = True, 5
    held_out = this.summary["constants"]["holdout_per_class"]
    other.summary["constants"]["checkpoint_dir"] = "where it is kept changes nothing"
    other.summary["constants"].pop("ema_decay")
    other.summary["constants"] = utils.with_defaults(other.summary)
    this.summary["constants"]["ema_decay"] = 0.0
    comparison = evaluate.compare([this], [other])
    assert comparison["different_constants"] == {
        "tta": {"other": False, "this": True},
        "holdout_per_class": {"other": 5, "this": held_out},
    }
    evaluate.print_comparison([this], [other], comparison)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines if line.startswith("differs")] == [
        "differs  TTA: other False, this True",
        f"differs  HOLDOUT_PER_CLASS: other 5, this {held_out}",
    ]


def test_an_evaluation_without_compare_removes_an_earlier_comparison(before):
    assert not (before / "comparison.png").exists()
    assert "comparison" not in read_metrics(before)


# ---- recipes ------------------------------------------------------------------------------------


@pytest.fixture
def recipe(before, tmp_path):
    """Makes results folders of invented runs: name, seed, images got wrong, other constants."""

    def make(name: str, seed: int, wrong: int, **constants) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in FILES:
            (folder / file).write_bytes((before / file).read_bytes())
        rows = read_predictions(before)
        for row in rows:
            label = int(row["label"])
            row["predicted"] = (label + 1) % 10 if int(row["index"]) < wrong else label
        with open(folder / "predictions.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        metrics = read_metrics(folder) | {"top1_accuracy": (360 - wrong) / 360}
        metrics["constants"] |= {"seed": seed, "learning_rate": 0.1} | constants
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return make


def compare_folders(these: list[Path], others: list[Path], folder: Path) -> str:
    flags = ["--results", *these, "--compare", *others, "--results-dir", folder, "--no-show"]
    with redirect_stdout(StringIO()) as output:
        evaluate.main(list(map(str, flags)))
    return output.getvalue()


def test_recipes_are_compared_from_their_folders_without_a_network(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "Classifier", None)  # which a network would need
    these = [
        recipe(f"a{seed}", seed, wrong, learning_rate=0.3) for seed, wrong in enumerate([9, 18])
    ]
    others = [recipe(f"b{seed}", seed, wrong) for seed, wrong in enumerate([72, 90, 99])]
    printed = compare_folders(these, others, tmp_path / "out")
    for line in [
        f"other    top-1 75.00 %, SEED 1: {others[1]}\n",  # 270 of 360
        f"this     top-1 97.50 %, SEED 0: {these[0]}\n",
        "top-1    other 75.83 %, this 96.25 %\n",
        "seeds    standard deviation: other 3.82, this 1.77 points\n",
        "differs  LEARNING_RATE: other 0.1, this 0.3\n",
        "verdict  this recipe is better than the other\n",
    ]:
        assert line in printed
    assert "caution" not in printed and printed.count("differs") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.json",
        "comparison.png",
    }
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    low, high = (100 * x for x in comparison["difference_interval_95"])
    interval = f"95 % interval over seeds and images {low:+.2f} to {high:+.2f} points\n"
    assert f"change   +20.42 points, {interval}" in printed
    assert 0 < low < 20.42 < high < 41
    assert "verdict  this recipe is worse than the other\n" in compare_folders(
        others, these, tmp_path / "out"
    )


def test_what_is_not_known_yet_comes_with_the_seeds_that_would_settle_it(recipe, tmp_path):
    these = [recipe(f"a{seed}", seed, wrong) for seed, wrong in enumerate([9, 90])]
    others = [recipe(f"b{seed}", seed, wrong) for seed, wrong in enumerate([72, 99])]
    printed = compare_folders(these, others, tmp_path / "out")
    more = json.loads((tmp_path / "out" / "comparison.json").read_text())["more_seeds"]
    assert more > 1
    seeds = f"about {more} more seeds of each recipe"
    assert f"verdict  not known yet: {seeds} would settle a difference of this size\n" in printed


def test_one_run_each_is_compared_as_with_a_checkpoint(before, after, tmp_path):
    printed = compare_folders([after[0]], [before], tmp_path / "out").splitlines()
    assert printed[:-1] == after[1].splitlines()[-len(printed) : -1]
    assert printed[-2].startswith("caution  two checkpoints, not two recipes")


@pytest.mark.parametrize(
    ("constants", "found"),
    [
        ({"seed": 0}, "a0, .*a1 have SEED \\[0, 0\\]"),
        ({"seed": 1, "momentum": 0.1, "flip": 0.3}, "a0, .*a1 differ in FLIP, MOMENTUM"),
    ],
)
def test_runs_of_one_recipe_differ_in_their_seeds_alone(recipe, tmp_path, constants, found):
    these = [recipe("a0", 0, 9), recipe("a1", wrong=9, **constants)]
    others = [recipe("b0", 0, 9), recipe("b1", 1, 9)]
    for sides in ((these, others), (others, these)):
        with pytest.raises(utils.UserError, match=found) as error:
            compare_folders(*sides, tmp_path / "out")
        assert "\n" not in str(error.value) and "each run with its own SEED" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    ["--results a0", "--results a0 a1", "--results a0 a1 --compare b0", "--compare b0 b1",
     "--results a0 --compare b0 b1", "--compare results"],
)  # fmt: skip
def test_sides_that_are_neither_one_run_each_nor_several_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(flags.split())
    assert end.value.code == 2
    assert "expected one folder, not --results-dir, or at least two each" in capsys.readouterr().err


# ---- the picture --------------------------------------------------------------------------------


def test_picture_shows_every_run_and_the_interval(recipe):
    sides = [
        [evaluate.read_result(str(recipe(f"{name}{seed}", seed, 30 + seed))) for seed in range(3)]
        for name in "ab"
    ]
    comparison = evaluate.compare(*sides)
    figure = evaluate.draw_comparison(*sides, comparison)
    _, upper, lower = figure.axes
    points = [line.get_xydata().tolist() for line in upper.get_lines()]
    accuracies = [330 / 360, 329 / 360, 328 / 360]
    assert points[0] == [[x, 0] for x in accuracies] and points[2] == [[x, 1] for x in accuracies]
    assert lower.get_lines()[0].get_xdata().tolist() == comparison["difference_interval_95"]


def draw(changes: list[float]) -> Axes:
    """The panel of comparison.png with the changes of F1, of invented ones."""
    run = Namespace(correct=np.array([True, False]))
    rows = [{"class": str(i), "f1_change": change} for i, change in enumerate(changes)]
    comparison = {"classes": rows, "difference": 0.0, "difference_interval_95": [-0.1, 0.1]}
    figure = evaluate.draw_comparison([run], [run], comparison)
    figure.canvas.draw()
    return figure.axes[0]


def test_picture_shows_the_15_largest_changes_each_way():
    changes = np.linspace(0.3, -0.5, 100).round(3).tolist()
    bars = [bar.get_width() for bar in draw(changes).patches]
    assert bars == changes[:15] + changes[-15:]
    bars = [bar.get_width() for bar in draw([0.2, 0.1, 0.0, 0.0, -0.1]).patches]
    assert bars == [0.2, 0.1, -0.1]


def test_picture_says_that_no_class_has_changed():
    panel = draw([0.0] * 100)
    assert panel.get_title() == "no class has changed" and not len(panel.patches)


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
        (edit("metrics.json", '"tta"', '"views"'), "it has no 'tta'"),
        (
            edit("metrics.json", '"digits"', '"cifar100"'),
            "its data set is 'cifar100', not 'digits'",
        ),
        (edit("metrics.json", '"constants": {', '"constants": 3, "_": {'), "cannot be compared"),
        (edit("confusion_matrix.csv", ",9", ",nine"), "its classes have other names"),
        (write("confusion_matrix.csv", b""), "confusion_matrix.csv cannot be compared"),
    ],
)
def test_files_that_cannot_be_compared_are_one_line(before, tmp_path, spoil, reason):
    for name in FILES:
        (tmp_path / name).write_bytes((before / name).read_bytes())
    like = evaluate.read_result(str(before))
    assert evaluate.read_result(str(tmp_path), like).summary["dataset"] == "digits"
    spoil(tmp_path)
    with redirect_stderr(StringIO()) as stderr, pytest.raises(utils.UserError, match=reason) as end:
        evaluate.read_result(str(tmp_path), like)
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
    assert "expected one folder, not --results-dir, or at least two each" in capsys.readouterr().err


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
