"""The recipes of train.py: training the head first, cosine, mixing, averages, freezing."""

import functools
import math
import os
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scripts
import torch
import torch.nn.functional as F
from scipy import stats
from scripts import assert_same, load, settings, share_folder
from sklearn.utils import compute_class_weight
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.models.resnet import BasicBlock, ResNet, resnet18
from torchvision.transforms import v2

import data
import evaluate
import model as resnet
import train
import utils

COSINE = {"schedule": "cosine", "warmup_epochs": 0.5, "epochs": 2}
RECIPES = {"head_epochs": 2, "freeze_stages": 1, "ema_decay": 0.9, "label_smoothing": 0.1}
RECIPES |= COSINE | {"mixup": 0.4, "cutmix": 1.0}
OTHERS = {"weights": "start.pth", "image_size": 40, "interpolation": "bicubic"}
FLAGS = shlex.split(utils.command_of(train.__file__, Namespace(**RECIPES | OTHERS)))[2:]
FLAGS = [*scripts.TINY, "--checkpoint-dir", "demo", *FLAGS]
HEAD = {f"fc.{layer}.{name}" for layer in (0, 3) for name in ("weight", "bias")}


def randomize_statistics(network: nn.Module) -> None:
    """As if it had been trained: at 0 and 1, keeping them or forgetting them would be the same."""
    for name, statistic in network.named_buffers():
        if "running" in name:
            statistic.normal_(0, 0.1) if "mean" in name else statistic.uniform_(0.5, 1.5)


def keep_every_epoch() -> None:
    """In the script's process: last-1.pt and best-1.pt are those after epoch 1."""
    save_run = utils.save_run

    def save_and_link(folder, metadata, parts, history, is_best=False):
        save_run(folder, metadata, parts, history, is_best)
        for name in ("last", "best") if history else ():
            os.link(folder / f"{name}.pt", folder / f"{name}-{history[-1]['epoch']}.pt")

    utils.save_run = save_and_link


def train_script(folder: Path, *flags: str) -> str:
    """Runs train.py with all recipes; returns what it printed."""
    options = {"cwd": folder, "prepare": keep_every_epoch}
    script = scripts.run_script("train.py", *FLAGS, *flags, **options)
    assert script.status == 0, script.stderr
    return script.stdout


@pytest.fixture
def finished(tmp_path_factory) -> Path:
    """The folder of the run: start.pth, from which it starts, and in demo/ what it left."""

    def fill(folder: Path) -> None:
        torch.manual_seed(0)
        randomize_statistics(start := resnet18())
        torch.save(start.state_dict(), folder / "start.pth")
        train_script(folder)

    return share_folder(tmp_path_factory, "recipes", fill)


def test_run_with_all_recipes_resumes_bit_for_bit(finished, tmp_path):
    unbroken, resumed = finished / "demo", tmp_path / "demo"
    resumed.mkdir()
    for name in ("last", "best"):
        (resumed / f"{name}.pt").hardlink_to(unbroken / f"{name}-1.pt")
    out = train_script(tmp_path, "--resume")
    assert re.findall(r"^epoch +(\d)/2", out, re.MULTILINE) == ["2"]
    for name in ("last.pt", "best.pt"):
        assert_same(load(resumed / name), load(unbroken / name))


def test_epochs_of_a_cosine_may_not_change(finished, monkeypatch):
    monkeypatch.chdir(finished)
    message = "trained with EPOCHS = 2, where its cosine schedule ends, now it is 3"
    with pytest.raises(utils.UserError, match=message):
        train.main([*FLAGS, "--resume", "--epochs", "3"])


def test_evaluation_repeats_the_plain_validation_of_an_epoch(finished):
    history = load(finished / "demo" / "last.pt")["history"]
    best = min(history, key=lambda row: row["val_loss"])
    for name, row in (("best", best), ("last", history[2]), ("last-0", history[0])):
        flags = ["--checkpoint", str(finished / "demo" / f"{name}.pt")]
        classifier = evaluate.Classifier(utils.parse_flags(evaluate.__file__, flags))
        _, held_out, _ = data.read_splits(Namespace(**classifier.constants))
        figures = evaluate.score(classifier.predict(held_out.images)[0], held_out.labels)
        assert classifier.checkpoint["epoch"] == row["epoch"]
        assert figures["loss"] == pytest.approx(row["val_loss"], rel=1e-5), name
        assert figures["top1_accuracy"] == pytest.approx(row["val_accuracy"], rel=1e-5), name


def test_run_begins_with_the_head_alone_and_keeps_the_average_beside_the_network(finished):
    header, *rows = (finished / "demo" / "history.csv").read_text().splitlines()
    columns = "epoch learning_rate train_loss train_accuracy images_per_second"
    assert header.split(",") == [*columns.split(), "val_loss", "val_accuracy", "seconds"]
    assert [row[:2] for row in rows] == ["0,", "1,", "2,"]
    start, after = load(finished / "start.pth"), load(finished / "demo" / "last-0.pt")["model"]
    assert after.keys() - start.keys() == HEAD
    for name in start.keys() & after.keys():
        assert torch.equal(after[name], start[name]), name
    best, last = (load(finished / "demo" / name) for name in ("best.pt", "last.pt"))
    assert not torch.equal(last["model"]["fc.0.weight"], last["trained_model"]["fc.0.weight"])
    assert "trained_model" not in best


def test_best_checkpoint_as_weights_gives_its_head_to_the_same_classes_only(finished):
    path, digits = finished / "demo" / "best.pt", list("0123456789")
    args, theirs = settings(architecture="resnet18", weights=str(path)), load(path)["model"]
    for classes, new in ((digits, set()), (digits[::-1], HEAD), (data.CLASSES, HEAD)):
        ours = resnet.make_model(args, classes, torch.device("cpu"), pretrained=True).state_dict()
        assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == new
        assert len(ours["fc.3.bias"]) == len(classes)


def make_run(rank: int = 0, world_size: int = 1, dtype=torch.float64, **changed):
    """(args, run, loader of 12 digits) of a small ResNet without dropout, unlike on other ranks."""
    args = settings(**scripts.AUGMENTATION | changed)
    torch.manual_seed(rank)
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        setattr(network, stage, BasicBlock(64, 64))
    network.fc = resnet.Head(64, 10)
    network.fc[2].p = 0.0
    randomize_statistics(network)
    resnet.freeze_stages(network, args.freeze_stages)
    network.to(dtype).conv1.register_forward_pre_hook(lambda _, images: images[0].to(dtype))
    utils.broadcast(network.state_dict().values())  # as main() does
    run = train.make_run(args, network, "fp32")
    run.network = resnet.wrap_network(network, compile_it=False)
    digits = data.read_digits("train")[0].select(slice(12))
    return args, run, data.TrainLoader(digits, args, rank, world_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_trains_on_what_it_gets_from_the_network_and_nothing_else_changes(dtype, monkeypatch):
    """Two epochs of one step: the rate is 0.05 (1 + cos(pi / 4)) / 2, then with 3 pi / 4."""
    recipe = {"head_epochs": 2, "head_learning_rate": 0.05, "ema_decay": 0.9}
    args, run, loader = make_run(dtype=torch.float32, **recipe)
    run.dtype = dtype  # of autocast
    inputs, rates = [], []
    run.model.fc.register_forward_pre_hook(lambda _, x: inputs.append(x[0].float()))
    resnet.predict(run.model, data.EvalLoader(loader.images, 12, 32, rows=loader.rows), dtype)
    cross_entropy = Mock(wraps=F.cross_entropy)
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    hook = register_optimizer_step_pre_hook(lambda sgd, *_: rates.append(sgd.param_groups[0]["lr"]))
    train.train_head(run, loader, args)
    hook.remove()
    after = run.model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == HEAD
    assert_same(dict(run.average.state_dict()), dict(after))  # it starts after the head
    expected, *seen = inputs
    orders = [(features[:, None] == expected).all(2).nonzero()[:, 1] for features in seen]
    for order, call in zip(orders, cross_entropy.call_args_list, strict=True):
        assert order.sort().values.tolist() == list(range(12))  # each image once
        assert torch.equal(call.args[1], loader.labels[order])
    assert not torch.equal(*orders)
    assert rates == pytest.approx([0.0426777, 0.0073223], abs=1e-7)


def test_rates_of_a_cosine_by_hand_which_losses_can_stop_but_not_change():
    """Three epochs of three steps, half an epoch of warm-up; a step's rate is that of its middle.

    At t epochs it is 0.1 t / 0.5, then 0.1 (1 + cos(72 degrees (t - 0.5))) / 2.
    """
    recipe = COSINE | {"epochs": 3, "learning_rate": 0.1, "batch_size": 4}
    recipe |= {"scheduler_patience": 0, "early_stopping_patience": 2}
    args, run, loader = make_run(**recipe)
    rates, history, stops = [], [], []
    run.optimizer.register_step_pre_hook(lambda sgd, *_: rates.append(sgd.param_groups[0]["lr"]))
    for epoch, loss in ((1, 2.0), (2, 2.5), (3, 2.0)):
        row = train.train_one_epoch(run, loader, epoch, args)
        history.append(row | {"epoch": epoch, "val_loss": loss})
        train.finish_epoch(run, history, args)
        stops.append(train.should_stop(history, args))
    # t = 1/6, 3/2 and 17/6: a third of the way up, cosines of 72 and 168 degrees
    expected = [0.03333333, 0.06545085, 0.00109262]
    assert len(rates) == 9 and rates[::4] == pytest.approx(expected, abs=1e-8)
    middles = [0.1, 0.06545085, 0.00954915]  # t = 1/2, 3/2, 5/2: cosines of 0, 72, 144 degrees
    assert [row["learning_rate"] for row in history] == pytest.approx(middles, abs=1e-8)
    assert stops == [False, False, True]


def test_average_follows_the_recursion_by_hand():
    args, run, loader = make_run(ema_decay=0.75, batch_size=4)
    expected = {name: x.clone() for name, x in run.model.state_dict().items()}
    decays = iter([2 / 11, 3 / 12, 4 / 13])  # (1 + steps) / (10 + steps), below 0.75

    def follow(*_):
        decay = next(decays)
        for name, x in run.model.state_dict().items():
            average = decay * expected[name] + (1 - decay) * x
            expected[name] = average if x.is_floating_point() else x.clone()

    run.optimizer.register_step_post_hook(follow)
    train.train_one_epoch(run, loader, 1, args)
    average = run.parts()["model"].state_dict()
    torch.testing.assert_close(dict(average), expected, rtol=0, atol=1e-12)
    assert (average["bn1.running_mean"] - run.model.bn1.running_mean).abs().max() > 1e-3


@pytest.mark.parametrize(("stages", "batch_norm"), [(0, True), (1, False), (4, False)])
def test_frozen_stages_and_frozen_batch_norm_alone_stay_as_they_were(stages, batch_norm):
    """Frozen batch norm uses and keeps its statistics, while its weights train."""
    flags = {"freeze_stages": stages, "freeze_batch_norm": batch_norm}
    args, run, loader = make_run(**flags)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    images, labels = next(loader.epoch(1))
    with torch.no_grad():
        expected = F.cross_entropy(run.model.eval()(images), labels).item()
    row = train.train_one_epoch(run, loader, 1, args)
    uses_statistics = row["train_loss"] == pytest.approx(expected, rel=1e-9)
    assert uses_statistics == (batch_norm or stages == 4)
    parts = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")[: 2 + stages if stages else 0]
    for name, x in run.model.state_dict().items():
        kept = batch_norm and ("running" in name or "num_batches" in name)
        assert torch.equal(x, before[name]) == (kept or name.split(".")[0] in parts), name


def work(path: Path) -> None:
    """Trains with all recipes, as one process of one or two; the first writes what it got.

    Batch norm is frozen and there is no dropout: whatever else differs is a mistake.
    """
    processes = utils.this_process()
    utils.connect("cpu")
    rank, world_size = processes.rank, processes.world_size
    recipes = RECIPES | {"batch_size": 4, "learning_rate": 0.001, "freeze_batch_norm": True}
    args, run, loader = make_run(rank, world_size, **recipes)
    test = data.read_digits("test")[0].select(slice(rank, 31, world_size))
    rows = [train.train_one_epoch(run, loader, epoch, args) for epoch in (0, 1, 2)]
    for statistic in run.validated.buffers():
        statistic.add_(rank)  # only those of rank 0 count
    rows += [train.validate(run, data.EvalLoader(test.images, 3, 32), test.labels)]
    for row in rows:
        row.pop("images_per_second", None)
    states = [run.model.state_dict(), run.average.state_dict()]
    if rank == 0:
        torch.save({"world_size": world_size, "found": [rows, states]}, path)
    utils.disconnect()


def test_two_processes_equal_one_with_all_recipes_in_float64(tmp_path):
    port = scripts.find_free_port()
    roles = [functools.partial(scripts.be_one_of_two, rank, port) for rank in (0, 1)]
    processes = [scripts.Script(__file__, "2.pt", cwd=tmp_path, prepare=role) for role in roles]
    work(tmp_path / "1.pt")
    assert [process.wait() for process in processes] == [0, 0], processes[1].stderr
    one, two = (load(tmp_path / name) for name in ("1.pt", "2.pt"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    torch.testing.assert_close(two["found"], one["found"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_mixing_equals_torchvision_on_batches_of_two(kind, monkeypatch):
    torch.manual_seed(0)
    images, labels = torch.rand(20, 3, 32, 32), torch.randint(10, (20,))
    theirs = getattr(v2, kind)(alpha=0.7, num_classes=10)
    drawn = [theirs.make_params([images]) for _ in range(10)]
    monkeypatch.setattr(theirs, "make_params", Mock(side_effect=drawn))
    pairs = [theirs(*pair) for pair in zip(images.split(2), labels.split(2))]
    box = torch.tensor([draw.get("box", (5, 5, 5, 5)) for draw in drawn]).repeat_interleave(2, 0)
    weight = torch.tensor([draw.get("lam", draw.get("lam_adjusted")) for draw in drawn])
    weight = weight.repeat_interleave(2)
    parameters = {"box_columns": box[:, [0, 2]], "box_rows": box[:, [1, 3]]}
    parameters["pixel_weight"] = weight if kind == "MixUp" else torch.ones(20)
    mixed = data.mix_images(images, parameters), data.mix_labels(labels, weight, 10)
    for ours, reference in zip(mixed, zip(*pairs)):
        torch.testing.assert_close(ours, torch.cat(reference), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("mixup", "cutmix", "share"), [(0.4, 0, 1), (0, 0.7, 0), (2.0, 0.7, 0.5)])
def test_mixing_weights_are_distributed_as_beta_and_as_torchvisions(mixup, cutmix, share):
    torch.manual_seed(0)
    theirs, images = v2.CutMix(alpha=0.7, num_classes=10), torch.zeros(2, 3, 32, 32)
    expected = [theirs.make_params([images])["lam_adjusted"] for _ in range(4000)]
    drawn = data.draw_mixing(mixup, cutmix, 4000, 32, seed=1)
    blended, weight = drawn["pixel_weight"] < 1, drawn["label_weight"]
    area = (drawn["box_rows"].diff(dim=1) * drawn["box_columns"].diff(dim=1))[:, 0]
    assert abs(blended.float().mean() - share) < 3 * math.sqrt(0.25 / 4000)
    if mixup:
        assert torch.equal(drawn["pixel_weight"][blended], weight[blended])
        assert stats.kstest(weight[blended], stats.beta(mixup, mixup).cdf).pvalue > 0.01
        assert not area[blended].any()
    if cutmix:
        assert stats.ks_2samp(weight[~blended], expected).pvalue > 0.01
        assert torch.equal(1 - area[~blended] / 1024, weight[~blended])


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1, 2])])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_accuracy_of_a_step_by_hand(smoothing, mixed, class_weights):
    """-log p of each class k is CE(k); smoothing by 0.2 takes 0.8 CE(label) + 0.2 mean CE."""
    logits, a = torch.eye(3)[[0, 1, 2, 1]], torch.tensor([0, 2, 1, 1])
    weight, b = torch.tensor([0.7, 0.2, 0.9, 0.4]), a[[1, 0, 3, 2]]
    losses = torch.eye(3).logsumexp(1)[0] - logits
    losses *= 1 if class_weights is None else class_weights
    losses = (1 - smoothing) * losses + smoothing * losses.mean(1, keepdim=True)
    of_a, of_b = losses[range(4), a], losses[range(4), b]
    expected = (weight * of_a + (1 - weight) * of_b if mixed else of_a).mean().item()
    labels, args = (
        data.mix_labels(a, weight, 3) if mixed else a,
        settings(label_smoothing=smoothing),
    )
    run = train.make_run(args, nn.Linear(3, 3, bias=False), "fp32", class_weights)
    nn.init.eye_(run.model.weight)
    loss, correct = train.train_step(run, logits, labels, args)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert correct == 2  # of 0, 2, 1, 1; mixed, the larger weights are those of 0, 0, 1, 1


def test_class_weights_are_scikit_learns_in_the_loss_of_the_head_too():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    weights = train.weigh_classes(settings(class_weights="balanced"), labels, 3)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    assert train.weigh_classes(settings(), labels, 3) is None
    head, features = nn.Linear(6, 3), torch.randn(12, 6)
    losses = F.cross_entropy(head(features), labels, reduction="none").detach()
    args = settings(head_epochs=1, head_learning_rate=1e-9)
    ((loss, _),) = train.fit_head(head, features, labels, args, weights)
    assert loss == pytest.approx((losses * weights[labels]).mean().item(), rel=1e-5)


# Values beyond the range of a constant, or not of its type; then what does not go together
BEYOND = """--head-epochs=-1 --head-epochs=100001 --head-epochs=1.5 --head-learning-rate=0
    --head-learning-rate=1000.1 --head-learning-rate=nan --schedule=COSINE --warmup-epochs=-0.5
    --warmup-epochs=inf --label-smoothing=-0.1 --label-smoothing=1.1 --ema-decay=-0.1
    --ema-decay=0.99999 --ema-decay=x --mixup=-0.1 --mixup=101 --cutmix=-0.1 --cutmix=101
    --freeze-stages=-1 --freeze-stages=5 --freeze-batch-norm=1"""
TOGETHER = [
    ("--epochs=0", 1, "--epochs 0: expected 1 or more without --head-epochs"),
    ("--warmup-epochs=1", 1, "--warmup-epochs 1.0: expected 0 with --schedule plateau"),
    ("--schedule=cosine --epochs=2 --warmup-epochs=2", 1, "2.0: expected less than 2 epochs"),
    ("--mixup=1 --batch-size=7", 1, "7: expected an even number of images per process"),
    ("--cutmix=1 --batch-size=6", 2, "6: expected an even number of images per process"),
]
AT_THE_EDGE = [
    ("--label-smoothing=1 --ema-decay=0.9999 --mixup=100 --cutmix=100", 1),
    ("--epochs=0 --head-epochs=1", 1),
    ("--schedule=cosine --epochs=2 --warmup-epochs=1.99", 1),
    ("--mixup=1 --batch-size=8", 2),
]


def check(flags: str, processes: int) -> None:
    train.check_combinations(utils.parse_flags(train.__file__, flags.split()), processes)


def test_flags_that_no_recipe_allows_are_one_line_and_exit_status_2(capsys):
    beyond = [(flag, 1, flag.split("=")[0]) for flag in BEYOND.split()]
    for flags, processes, message in beyond + TOGETHER:
        with pytest.raises(SystemExit) as end:
            check(flags, processes)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and message in err
    for flags, processes in AT_THE_EDGE:
        check(flags, processes)


def test_too_few_images_to_mix_or_of_a_class_are_one_message():
    odd = data.read_digits("train")[0].select(slice(19))
    assert data.TrainLoader(odd, settings(mixup=1.0)).batch_size == 18
    for changed, processes, message in (
        ({"train_per_class": 1, "mixup": 1.0}, 8, "too few for 8"),
        ({"holdout_per_class": 144}, 1, "Class . has 1.. training images: expected"),
    ):
        args, this = settings(dataset="digits", **changed), utils.Processes(world_size=processes)
        with pytest.raises(SystemExit, match=message):
            train_split, val_split, _ = data.read_data(args, this)
            data.make_loaders(args, this, torch.device("cpu"), train_split, val_split)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
