"""evaluate.py --compare: its statistics, what it writes and prints, bad input; --images' table."""

import csv
import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from scipy.special import ndtr, ndtri
from scripts import load, read_json, read_predictions, run_script
from sklearn.metrics import f1_score

import data
import evaluate
import model as resnet
import utils

# ---- statistics ---------------------------------------------------------------------------------


def compare(these: list[np.ndarray], others: list[np.ndarray]) -> tuple[dict, float, float]:
    """The comparison of runs, and the bounds of its interval."""
    comparison = evaluate.compare_accuracies(np.stack(these), np.stack(others))
    return comparison, *comparison["difference_interval_95"]


def right_on(*counts: int, images: int) -> list[np.ndarray]:
    """Runs that are right on the first so many images."""
    return [np.arange(images) < count for count in counts]


def test_one_run_each_by_hand():
    # Of ten images, three are right in this run only, one in the other only, five in both.
    this, other = np.array([[1, 1, 1, 0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 0]], bool)
    comparison, low, high = compare([this], [other])
    assert (comparison["only_this_correct"], comparison["only_other_correct"]) == (3, 1)
    assert comparison["difference"] == pytest.approx(0.2)
    # Differences per image: three of 1, one of -1, six of 0. Variance (4 - 10 * 0.2^2) / 9 = 0.4.
    assert [low, high] == pytest.approx([0.2 - 1.96 * 0.2, 0.2 + 1.96 * 0.2], rel=1e-4)
    # Of 16 ways that four coins fall, 2 * (1 + 4) are at least as uneven as 3 to 1.
    assert comparison["mcnemar_p"] == pytest.approx(10 / 16)
    comparison, low, high = compare([this], [this])
    assert (low, high, comparison["mcnemar_p"]) == (0, 0, 1)


def test_two_seeds_each_by_hand():
    # Runs are right on 4 and 2 of 8 images, and on 3 and 1: means 3/8 and 2/8.
    comparison, low, high = compare(right_on(4, 2, images=8), right_on(3, 1, images=8))
    assert comparison["difference"] == pytest.approx(1 / 8)
    # Accuracies vary by 2 * (1/8)^2 per recipe, with 1 degree of freedom: 1/32. Images add less
    # than chance does, so the variance is 1/32 (1/2 + 1/2) with 2 degrees of freedom: t = 4.303.
    assert (high - low) / 2 == pytest.approx(4.3027 / 32**0.5, rel=1e-4)
    assert comparison["more_seeds"] is None or comparison["more_seeds"] > 10


def test_more_seeds_are_as_many_as_settle_the_difference():
    comparison, low, high = compare(
        right_on(510, 490, images=1000), right_on(485, 465, images=1000)
    )
    assert low < 0 < high
    n = 2 + comparison["more_seeds"]
    width, narrower = (stats.t.ppf(0.975, 2 * m - 2) * (2 * 0.0002 / m) ** 0.5 for m in (n - 1, n))
    assert narrower < 0.025 < width


def test_runs_of_equal_accuracy_have_an_interval_all_the_same():
    runs = [np.roll(np.arange(100) < 50, shift) for shift in (0, 50, 25, 75)]
    _, low, high = compare(runs[:2], runs[2:])
    assert low < -0.05 and high > 0.05


def simulate_comparisons(count, seeds, images, seeds_sd, chance, recipe, difference=0.0):
    """How often the interval holds the true difference, and how often it excludes zero.

    The runs of two recipes have about 75 % of the images right. Each image has a score: one part
    that all runs share, one of the recipe and one, by chance, of the run; chance and recipe are the
    last two's shares of the variance. seeds_sd: standard deviation, from seed to seed, of the
    accuracy on infinitely many images.
    """
    rng, intervals = np.random.default_rng(seeds), []
    for _ in range(count):
        sides, shared = [], (1 - chance - recipe) ** 0.5 * rng.standard_normal(images)
        for mean in (0.75 + difference, 0.75):
            of_recipe = shared + recipe**0.5 * rng.standard_normal(images)
            accuracies = mean + seeds_sd * rng.standard_normal((seeds, 1))
            certain = of_recipe + ndtri(accuracies)
            sides.append(rng.random((seeds, images)) < ndtr(certain / chance**0.5))
        intervals.append(compare(*sides)[1:])
    low, high = np.transpose(intervals)
    return np.mean((low <= difference) & (difference <= high)), np.mean(low > 0)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_interval_of_recipes_that_do_not_differ_holds_zero(seeds):
    holds, _ = simulate_comparisons(500, seeds, 1000, 0.005, 0.1, 0.05)
    assert 0.925 <= holds <= 0.975  # two standard errors around 95 %


# Of 2,500 images: accuracies spread by 0.4, 0.6 and 1 points over seeds; two runs of a recipe
# disagree on 7, 12 and 12 % of the images, and the images add 0, 0.3 and 0.5 points to the
# difference's spread. With CIFAR-100's 10,000 images it would all be half of that.
MIXES = [(0.002, 0.04, 0.0), (0.004, 0.12, 0.05), (0.008, 0.12, 0.15)]


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_interval_holds_the_truth_in_94_to_96_percent_of_1000_comparisons(seeds, mix):
    holds, _ = simulate_comparisons(1000, seeds, 2500, *mix)
    assert 0.94 - 0.014 <= holds <= 0.96 + 0.014  # two standard errors of 1,000
    _, found = simulate_comparisons(300, seeds, 2500, *mix, difference=0.02)
    assert found > {2: 0.2, 3: 0.4, 5: 0.6}[seeds]


# ---- two networks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(finished_run, tmp_path_factory) -> list[Path]:
    """Two networks, their last layers fitted to 60 and to 300 digits by least squares."""
    folder, state = tmp_path_factory.mktemp("fitted"), load(finished_run / "demo/best.pt")
    model, digits = resnet.build_model("resnet18", 10), data.read_digits("train")[0]
    model.load_state_dict(state["model"])
    loader = data.EvalLoader(digits.stored[:300], 100, 32)
    features = resnet.extract_features(model, loader, torch.float32)
    with torch.inference_mode():
        hidden = F.pad(model.fc[0](features).relu().double(), (0, 1), value=1)
    for count in (60, 300):
        inverse = torch.linalg.pinv(hidden[:count], rtol=1e-5)
        fit = inverse @ F.one_hot(digits.labels[:count]).double()
        state["model"] |= {"fc.3.weight": fit[:-1].T.float(), "fc.3.bias": fit[-1].float()}
        state["constants"]["learning_rate"] = count / 1000
        utils.save_checkpoint(folder / f"{count}.pt", state)
    return [folder / "60.pt", folder / "300.pt"]


def run_main(folder: Path, *flags: object) -> str:
    """Evaluates into this folder; returns what was printed."""
    flags = ["--results-dir", folder, *flags]
    with redirect_stdout(StringIO()) as output:
        evaluate.main(list(map(str, flags)))
    return output.getvalue()


@pytest.fixture(scope="module")
def before(checkpoints, tmp_path_factory) -> Path:
    """The results of the first network, where an earlier comparison had left its file."""
    folder = tmp_path_factory.mktemp("before")
    (folder / "comparison.json").write_text("of an earlier evaluation")
    run_main(folder, "--checkpoint", checkpoints[0])
    return folder


@pytest.fixture(scope="module")
def after(checkpoints, before, tmp_path_factory) -> tuple[Path, str]:
    """The results of the second network, compared with the first, and what was printed."""
    folder = tmp_path_factory.mktemp("after")
    return folder, run_main(folder, "--checkpoint", checkpoints[1], "--compare", before)


def test_results_hold_constants_and_history_and_no_earlier_comparison(before, checkpoints):
    metrics, state = read_json(before / "metrics.json"), load(checkpoints[0])
    assert metrics["constants"] == state["constants"] and metrics["history"] == state["history"]
    assert "comparison" not in metrics and not (before / "comparison.json").exists()


def test_comparison_has_the_numbers_of_the_two_predictions_files(before, after):
    this, other = read_predictions(after[0]), read_predictions(before)
    labels = this["label"]
    assert all((this[name] == other[name]).all() for name in ("index", "label"))
    right, other_right = this["predicted"] == labels, other["predicted"] == labels
    comparison = read_json(after[0] / "metrics.json")["comparison"]
    assert comparison["only_this_correct"] == (right & ~other_right).sum() > 5
    assert comparison["only_other_correct"] == (other_right & ~right).sum() > 5
    assert comparison["difference"] == pytest.approx(right.mean() - other_right.mean())
    low, high = comparison["difference_interval_95"]
    assert low < comparison["difference"] < high
    f1, other_f1 = (f1_score(labels, x["predicted"], average=None) for x in (this, other))
    changes = [row["f1_change"] for row in comparison["classes"]]
    assert changes == sorted(changes, reverse=True) and len(changes) == 10
    for row in comparison["classes"]:
        number = int(row["class"])
        assert row["f1_change"] == pytest.approx(f1[number] - other_f1[number])
        hits = [(x & (labels == number)).sum() for x in (right, other_right)]
        assert [row["correct"], row["other_correct"]] == hits


def test_every_number_is_printed_with_what_it_is(checkpoints, before, after):
    folder, printed = after
    metrics = [read_json(x / "metrics.json") for x in (before, folder)]
    other, this = (100 * x["top1_accuracy"] for x in metrics)
    comparison = metrics[1]["comparison"]
    low, high = (100 * x for x in comparison["difference_interval_95"])
    counts = "{only_other_correct} correct only in the other, {only_this_correct} only in this"
    assert printed.index("macro F1") < printed.index("compared with")
    assert printed.splitlines()[-7:] == [
        f"compared with {before}: {checkpoints[0]}, epoch {metrics[0]['epoch']}",
        f"top-1    other {other:.2f} %, this {this:.2f} %",
        f"change   {this - other:+.2f} points, paired 95 % interval {low:+.2f} to {high:+.2f} points",
        f"images   {counts.format(**comparison)}; McNemar's exact test: p < 0.0001",
        "differs  LEARNING_RATE: other 0.06, this 0.3",
        "caution  two checkpoints, not two recipes: another SEED changes the accuracy too",
        f"results  {folder}; open {folder / 'report.html'} in a browser",
    ]


# ---- recipes, and runs without their networks ---------------------------------------------------


@pytest.fixture
def recipe(before, tmp_path):
    """Makes the results of runs, each wrong on the first so many images, with consecutive seeds.

    constants: changed ones. The runs are older than EMA_DECAY.
    """

    def make(name: str, wrong: list[int], seed=0, tta=False, **constants) -> list[Path]:
        folders = [tmp_path / f"{name}{number}" for number in range(len(wrong))]
        for number, (folder, count) in enumerate(zip(folders, wrong)):
            shutil.copytree(before, folder)
            rows = read_predictions(folder)
            rows["predicted"] = (rows["label"] + (rows["index"] < count)) % 10
            header = ",".join(rows.dtype.names)  # without names, as earlier versions wrote them
            np.savetxt(folder / "predictions.csv", rows, "%.9g", ",", header=header, comments="")
            metrics = read_json(folder / "metrics.json")
            metrics |= {"top1_accuracy": 1 - count / 360, "tta": tta}
            del metrics["constants"]["ema_decay"]
            metrics["constants"] |= {"seed": seed + number, "learning_rate": 0.1} | constants
            (folder / "metrics.json").write_text(json.dumps(metrics))
        return folders

    return make


def compare_folders(these: list[Path], others: list[Path], folder: Path) -> str:
    return run_main(folder, "--results", *these, "--compare", *others)


def test_recipes_are_compared_from_their_folders_without_a_network(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "Classifier", None)  # which a network would need
    these, others = recipe("a", [9, 18], learning_rate=0.3), recipe("b", [72, 90, 99], seed=5)
    printed = compare_folders(these, others, tmp_path / "out")
    table = tmp_path / "out" / "comparison.json"
    low, high = (100 * x for x in read_json(table)["difference_interval_95"])
    assert 0 < low < 20.42 < high < 41
    interval = f"95 % interval over seeds and images {low:+.2f} to {high:+.2f} points"
    assert printed.splitlines()[-11:] == [
        f"other    top-1 80.00 %, SEED 5: {others[0]}",
        f"other    top-1 75.00 %, SEED 6: {others[1]}",  # 270 of 360
        f"other    top-1 72.50 %, SEED 7: {others[2]}",
        f"this     top-1 97.50 %, SEED 0: {these[0]}",
        f"this     top-1 95.00 %, SEED 1: {these[1]}",
        "top-1    other 75.83 %, this 96.25 %",
        f"change   +20.42 points, {interval}",
        "seeds    standard deviation: other 3.82, this 1.77 points",
        "differs  LEARNING_RATE: other 0.1, this 0.3",
        "verdict  this recipe is better than the other",
        f"results  {table}",
    ]
    assert [*(tmp_path / "out").iterdir()] == [table]


@pytest.mark.parametrize(
    ("wrong", "other_wrong", "verdict"),
    [
        ([72, 90], [9, 18], "this recipe is worse than the other"),
        ([9, 90], [72, 99], "not known yet: about {} more seeds of each recipe would settle a "),
        ([9, 90], [10, 90], "not known yet: over 100 more seeds of each recipe would settle a "),
    ],
)
def test_verdict_says_how_certain_it_is(wrong, other_wrong, verdict, recipe, tmp_path):
    printed = compare_folders(recipe("a", wrong), recipe("b", other_wrong), tmp_path / "out")
    more = read_json(tmp_path / "out/comparison.json")["more_seeds"]
    assert f"verdict  {verdict.format(more)}" in printed


def test_one_run_each_is_compared_as_with_a_checkpoint(before, after, tmp_path):
    printed = compare_folders([after[0]], [before], tmp_path / "out").splitlines()
    assert len(printed) > 10 and printed[:-1] == after[1].splitlines()[-len(printed) : -1]


def test_only_settings_that_change_the_result_are_said_to_differ(recipe, tmp_path):
    these = recipe("a", [9], tta=True, ema_decay=0.0, holdout_per_class=0)
    others = recipe("b", [9], holdout_per_class=5, checkpoint_dir="elsewhere")
    printed = compare_folders(these, others, tmp_path / "out").splitlines()
    selected = "(with 0, these images selected the checkpoint: optimistic)"
    averaged = "(averaging two views changes the accuracy by itself)"
    assert [line for line in printed if line.startswith("differs")] == [
        f"differs  TTA: other False, this True {averaged}",
        f"differs  HOLDOUT_PER_CLASS: other 5, this 0 {selected}",
    ]


def test_runs_of_one_recipe_differ_in_their_seeds_alone(recipe, tmp_path):
    sound, same_seed = recipe("a", [9, 9]), recipe("b", [9]) + recipe("c", [9])
    two_recipes = recipe("d", [9]) + recipe("e", [9], seed=1, momentum=0.1, flip=0.3)
    for these, others, found in [
        (same_seed, sound, r"b0, .*c0 have SEED \[0, 0\]"),
        (sound, two_recipes, "d0, .*e0 differ in FLIP, MOMENTUM"),
    ]:
        with pytest.raises(utils.UserError, match=rf"^.*{found}.* each run with its own SEED$"):
            compare_folders(these, others, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- bad input ----------------------------------------------------------------------------------


SIDES = "--results a0; --results a0 a1; --results a0 a1 --compare b0; --compare b0 b1; "
SIDES += "--results a0 --compare b0 b1; --compare results; --compare b0 --results-dir a0/../b0"


@pytest.mark.parametrize("flags", SIDES.split("; "))
def test_sides_that_are_neither_one_run_each_nor_several_are_refused(flags, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        evaluate.main(flags.split())
    assert "expected one folder, not --results-dir, or at least two each" in capsys.readouterr().err


WHOLE = rb"(?s).*"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "pattern", "text", "reason"),
    [
        ("metrics.json", None, None, "No such file or directory"),
        ("predictions.csv", None, None, "No such file or directory"),
        ("predictions.csv", rb"\n.*\n\Z", b"\n", "it has 359 images, not 360"),
        ("predictions.csv", rb"\n9,", b"\n9\n", "it has 361 images, not 360"),
        ("predictions.csv", WHOLE, b"", "it has 0 images, not 360"),
        ("predictions.csv", WHOLE, b"\xff\xfe\0", "it has 0 images, not 360"),
        ("predictions.csv", rb"\n7,", b"\n8,", "its labels are not those of the test images"),
        ("predictions.csv", rb"\n7,", b"\nx,", "could not convert string 'x'"),
        ("predictions.csv", rb"\n(\d+),([0-8]),\2,", rb"\n\1,\2,9,", "its accuracy is not that of"),
        ("metrics.json", WHOLE, b"", "Expecting value"),
        ("metrics.json", WHOLE, b"[]", "list indices must be integers"),
        ("metrics.json", WHOLE, b'{"loss": 1}', "it has no 'dataset'"),
        ("metrics.json", b'"tta"', b'"views"', "it has no 'tta'"),
        ("metrics.json", b'"digits"', b'"cifar100"', "its data set is 'cifar100', not 'digits'"),
        (
            "metrics.json",
            b'"constants": {',
            b'"constants": 3, "_": {',
            "'int' object is not iterable",
        ),
        ("confusion_matrix.csv", b",9", b",nine", "its classes have other names"),
        ("confusion_matrix.csv", WHOLE, b"", "not enough values to unpack"),
    ],
)
def test_files_that_cannot_be_compared_are_one_line(before, tmp_path, name, pattern, text, reason):
    folder = shutil.copytree(before, tmp_path / "spoiled")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if pattern:
        spoiled = re.sub(pattern, text, content, count=1)
        assert spoiled != content
        (folder / name).write_bytes(spoiled)
    of_all = reason.startswith("its ")  # one file does not fit another
    named = f"spoiled{'' if of_all else '/' + name} cannot be compared: {reason}"
    with pytest.raises(utils.UserError, match=f"^.*{named}.* evaluate that checkpoint again$"):
        evaluate.read_result(str(folder), evaluate.read_result(str(before)))


def test_a_single_image_cannot_be_compared(tmp_path):
    """Its difference has no variance: NaN, which is not JSON."""
    (tmp_path / "predictions.csv").write_text("index,label,predicted,confidence\n0,1,1,0.9\n")
    (tmp_path / "confusion_matrix.csv").write_text("true/predicted,a,b\n")
    metrics = {"dataset": "1 pictures", "images": 1, "checkpoint": "best.pt", "epoch": 1}
    metrics |= {"tta": False, "top1_accuracy": 1.0, "constants": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(utils.UserError, match="has a single test image. Expected two or more to"):
        evaluate.main(["--compare", str(tmp_path), "--results", str(tmp_path)])


def break_network() -> None:
    resnet.predict = None


def test_a_missing_folder_ends_the_script_before_the_network_runs(checkpoints, tmp_path):
    flags = ["--checkpoint", str(checkpoints[0]), "--compare", "nowhere"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path, prepare=break_network)
    assert script.status == 1 and script.stderr.count("\n") == 1
    assert script.stderr.startswith("nowhere/metrics.json cannot be compared: No such file")
    assert not list((tmp_path / "results").iterdir())


# ---- the user's own pictures --------------------------------------------------------------------


def test_pictures_csv_has_what_is_printed(checkpoints, tmp_path):
    digit = data.read_digits("test")[0].images[3].permute(1, 2, 0).numpy()
    photo = str(tmp_path / "photo.jpg")
    Image.fromarray(digit).resize((96, 96)).save(photo)
    printed = run_main(tmp_path, "--checkpoint", checkpoints[1], "--images", photo, photo)
    with open(tmp_path / "pictures.csv", newline="") as file:
        header, row, again = csv.reader(file)
    assert header[:4] == ["file", "class_1", "probability_1", "class_2"]
    assert row == again and row[0] == photo
    names, shares = row[1::2], [float(x) for x in row[2::2]]
    assert shares == sorted(shares, reverse=True) and len({*names}) == 5
    lines = [f"{100 * share:6.2f} %  {name}\n" for name, share in zip(names, shares)]
    assert f"{photo}\n{''.join(lines)}" in printed
