"""The recipes of train.py: training the head first, cosine, mixing, averages, frozen batch norm."""

import csv
import functools
import json
import math
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import share_folder
from scipy import stats
from scripts import AUGMENTATION, TINY, Script, be_one_of_two, find_free_port, run_script, settings
from sklearn.utils import compute_class_weight
from test_train import assert_same, load
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.models.resnet import BasicBlock, ResNet, resnet18
from torchvision.transforms import v2

import data
import model as resnet
import train
import utils

COSINE = {"schedule": "cosine", "warmup_epochs": 0.5, "epochs": 2}
MIXING = {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1}
RECIPES = {"weights": "start.pth", "head_epochs": 2, "ema_decay": 0.9} | COSINE | MIXING
RUNS = {
    "averaged": RECIPES,
    "frozen": RECIPES | {"ema_decay": 0.0, "freeze_stages": 2, "freeze_batch_norm": True},
    "head": (HEAD := {"weights": "start.pth", "head_epochs": 2, "epochs": 0}),
    "bicubic": HEAD | {"image_size": 40, "interpolation": "bicubic"},
}


def randomize_statistics(network: nn.Module) -> None:
    """As if it had been trained: at 0 and 1, keeping them or forgetting them would be the same."""
    for name, statistic in network.named_buffers():
        if "running" in name:
            statistic.normal_(0, 0.1) if "mean" in name else statistic.uniform_(0.5, 1.5)


def small_run(rank: int = 0, world_size: int = 1, dtype=torch.float64, **changed):
    """(args, run, loader of 16 digits) of a ResNet-10 without dropout, unlike on other ranks."""
    args = settings(**AUGMENTATION | changed)
    torch.manual_seed(rank)
    network = ResNet(BasicBlock, [1, 1, 1, 1], 10)
    network.fc = resnet.Head(512, 10)
    network.fc[2].p = 0.0
    randomize_statistics(network)
    resnet.freeze_stages(network, args.freeze_stages)
    network.to(dtype).conv1.register_forward_pre_hook(lambda _, images: images[0].to(dtype))
    loader = data.TrainLoader(
        data.read_digits("train")[0].select(slice(16)), args, rank, world_size
    )
    utils.broadcast(network.state_dict().values())  # as main() does
    run = train.make_run(args, network, "fp32")
    run.network = train.wrap_network(network, compile_it=False)
    return args, run, loader


def linear_run(model: nn.Module, **changed):
    """(args, run, loader of 3 steps) of a model of 6 features."""
    args = settings(batch_size=4, **changed)
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    return args, train.make_run(args, model, "fp32"), Batches(features, torch.arange(12) % 3)


def test_class_weights_are_scikit_learns_in_the_losses_of_network_and_head():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)
    args, run, _ = linear_run(nn.Linear(6, 3), class_weights="balanced")
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    weights = train.weigh_classes(args, labels, 3)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    assert train.weigh_classes(settings(), labels, 3) is None
    run.class_weights = weights
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    losses = F.cross_entropy(run.model(features), labels, reduction="none").detach()
    by_hand = (losses * weights[labels]).mean()
    loss, _ = train.train_step(run, features, labels, args)
    torch.testing.assert_close(loss, by_hand)
    head, args = nn.Linear(6, 3), settings(head_epochs=1, batch_size=12, head_learning_rate=1e-9)
    losses = F.cross_entropy(head(features), labels, reduction="none").detach()
    by_hand = (losses * weights[labels]).mean()
    ((loss, _),) = train.fit_head(head, features, labels, args, weights)
    assert loss == pytest.approx(by_hand.item(), rel=1e-5)


class Batches:
    """A loader of features (N, num_features) and their labels, 4 at a time, in their order."""

    rank, world_size, batch_size = 0, 1, 4

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels) // 4

    def epoch(self, epoch: int):
        return zip(self.features.split(4), self.labels.split(4))


def prepare() -> None:
    """In a script's process: 60 test images; last-1.pt is last.pt after epoch 1."""
    save_run, read_digits = utils.save_run, data.read_digits

    def read_60_to_test(part: str):
        digits, classes = read_digits(part)
        return digits.select(slice(60 if part == "test" else None)), classes

    data.read_digits = read_60_to_test

    def save_and_link(folder, metadata, parts, history, is_best=False):
        save_run(folder, metadata, parts, history, is_best)
        for name in ("last", "best") if history else ():
            os.link(folder / f"{name}.pt", folder / f"{name}-{history[-1]['epoch']}.pt")

    utils.save_run = save_and_link


def train_small(folder: Path, *flags: str, **changed) -> str:
    """Runs train.py in ResNet-18, validated on the test images; returns what it printed."""
    flags = [*TINY, "--holdout-per-class", "0", "--checkpoint-dir", "demo", *flags]
    flags += ["--architecture", "resnet18"]
    for name, value in changed.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    script = run_script("train.py", *flags, cwd=folder, prepare=prepare)
    assert script.status == 0, script.stderr
    return script.stdout


@pytest.fixture
def finished(tmp_path_factory):
    """The folder of a run by its name in RUNS: start.pth, and in demo/ what it left."""

    def fill(folder: Path, name: str) -> None:
        torch.manual_seed(0)
        randomize_statistics(start := resnet18())
        torch.save(start.state_dict(), folder / "start.pth")
        train_small(folder, **RUNS[name])

    return lambda name: share_folder(
        tmp_path_factory, f"recipes-{name}", functools.partial(fill, name=name)
    )


@pytest.mark.parametrize(("name", "epoch"), [("averaged", 0), ("averaged", 1), ("frozen", 1)])
def test_run_with_all_recipes_resumes_bit_for_bit(name, epoch, finished, tmp_path):
    unbroken, resumed = finished(name) / "demo", tmp_path / "demo"
    resumed.mkdir()
    for file in ("last", "best"):
        (resumed / f"{file}.pt").hardlink_to(unbroken / f"{file}-{epoch}.pt")
    out = train_small(tmp_path, "--resume", **RUNS[name])
    trained = re.findall(r"^epoch +(\d)/2", out, re.MULTILINE)
    assert trained == ["0", "1", "2"][epoch + 1 :]  # the head is not trained twice
    for file in ("last.pt", "best.pt"):
        assert_same(load(resumed / file), load(unbroken / file))


@pytest.mark.parametrize(("name", "epochs"), [("averaged", "012"), ("bicubic", "0")])
def test_evaluation_repeats_the_plain_validation_of_the_best_epoch(
    name, epochs, finished, tmp_path
):
    folder = finished(name) / "demo"
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in rows] == list(epochs)
    columns = "learning_rate train_loss train_accuracy images_per_second val_loss val_accuracy"
    assert list(rows[0]) == ["epoch", *columns.split(), "seconds"]
    flags = ["--checkpoint", str(folder / "best.pt"), "--no-show"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path, prepare=prepare)
    assert script.status == 0, script.stderr
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert str(metrics["epoch"]) == best["epoch"]
    for ours, theirs in (("loss", "val_loss"), ("top1_accuracy", "val_accuracy")):
        assert metrics[ours] == pytest.approx(float(best[theirs]), rel=1e-5)


def test_best_checkpoint_holds_the_average_and_the_last_one_both(finished):
    folder = finished("averaged") / "demo"
    best = load(folder / "best.pt")
    assert_same(best["model"], load(folder / f"last-{best['epoch']}.pt")["model"])
    head = {f"fc.{layer}.{name}" for layer in (0, 3) for name in ("weight", "bias")}
    assert best["model"].keys() - resnet18().state_dict().keys() == head
    last = load(folder / "last.pt")
    assert not torch.equal(last["model"]["conv1.weight"], last["trained_model"]["conv1.weight"])
    assert "trained_model" not in best


def test_head_alone_leaves_the_backbone_and_its_statistics_as_they_were(finished):
    folder = finished("head")
    start, best = load(folder / "start.pth"), load(folder / "demo" / "best.pt")["model"]
    for name, tensor in start.items():
        assert name.startswith("fc.") or torch.equal(best[name], tensor), name


def test_epochs_of_a_cosine_may_not_change(finished):
    path = finished("averaged") / "demo" / "last.pt"
    args = Namespace(**load(path)["constants"] | {"resume": True})
    checkpoint = utils.find_checkpoint(path, args)
    utils.require_same_settings(checkpoint, path, args)
    args.epochs = 3
    message = "trained with EPOCHS = 2, where its cosine schedule ends, now it is 3"
    with pytest.raises(utils.UserError, match=message):
        utils.require_same_settings(checkpoint, path, args)


def test_weights_may_be_a_best_checkpoint_whose_head_is_used(finished, tmp_path):
    """An epoch at a rate of nearly zero: the figures are those of the checkpoint."""
    best = finished("head") / "demo" / "best.pt"
    recipe = {"freeze_batch_norm": True, "epochs": 1, "learning_rate": 1e-9}
    train_small(tmp_path, weights=best, **recipe)
    row = load(tmp_path / "demo" / "last.pt")["history"][0]
    assert row["val_loss"] == pytest.approx(load(best)["history"][0]["val_loss"], rel=1e-3)


def load_into_resnet18(weights: Path, classes: list[str]) -> dict:
    """What WEIGHTS makes of a new model, a state_dict."""
    network = resnet.build_model("resnet18", len(classes))
    train.load_weights(network, settings(architecture="resnet18", weights=str(weights)), classes)
    return network.state_dict()


def test_weights_of_other_classes_get_a_new_head(finished):
    best, digits = finished("head") / "demo" / "best.pt", list("0123456789")
    state = load(best)["model"]
    for classes, kept in ((digits, True), (digits[::-1], False), (data.CLASSES, False)):
        found = load_into_resnet18(best, classes)
        assert torch.equal(found["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])
        assert len(found["fc.3.bias"]) == len(classes)
        assert torch.equal(found["fc.0.weight"], state["fc.0.weight"]) == kept


@pytest.mark.parametrize("damage", ["cut short", "one bit", "not a number"])
def test_damaged_weights_are_one_message(damage, finished, tmp_path):
    raw = bytearray((finished("head") / "demo" / "best.pt").read_bytes())
    raw[len(raw) // 2] ^= 64 * (damage == "one bit")
    (tmp_path / "best.pt").write_bytes(raw[: len(raw) // 2 if damage == "cut short" else None])
    if damage == "not a number":
        checkpoint = load(tmp_path / "best.pt")
        checkpoint["model"]["conv1.weight"][0] = math.nan
        torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(utils.UserError, match="best.pt is not a state_dict file") as error:
        load_into_resnet18(tmp_path / "best.pt", list("0123456789"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_trains_on_what_it_gets_from_the_network_and_nothing_else_changes(dtype, monkeypatch):
    """Two epochs of one step: the rate is 0.05 (1 + cos(pi / 4)) / 2, then with 3 pi / 4."""
    recipe = {"head_epochs": 2, "head_learning_rate": 0.05, "ema_decay": 0.9}
    args, run, loader = small_run(dtype=torch.float32, **recipe)
    run.dtype = dtype  # of autocast
    inputs, labels_of, rates = [], [], []
    hook = run.model.fc.register_forward_pre_hook(lambda _, x: inputs.append(x[0].float()))
    resnet.predict(run.model, data.EvalLoader(loader.images, 16, 32), dtype)

    def recorded_loss(logits, labels, loss=F.cross_entropy, **options):
        labels_of.append(labels)
        return loss(logits, labels, **options)

    monkeypatch.setattr(F, "cross_entropy", recorded_loss)
    rate_hook = register_optimizer_step_pre_hook(
        lambda sgd, *_: rates.append(sgd.param_groups[0]["lr"])
    )
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    train.train_head(run, loader, args)
    hook.remove(), rate_hook.remove()
    after = run.model.state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed == ["fc.0.weight", "fc.0.bias", "fc.3.weight", "fc.3.bias"]
    assert_same(dict(run.average.state_dict()), dict(after))  # it starts after the head
    orders = []
    for features, labels in zip(inputs[1:], labels_of, strict=True):  # each image once, shuffled
        orders.append((features[:, None] == inputs[0]).all(2).nonzero()[:, 1])
        assert torch.equal(orders[-1].sort().values, torch.arange(16))
        assert torch.equal(labels, loader.labels[orders[-1]])
    assert not torch.equal(*orders)
    assert rates == pytest.approx([0.0426777, 0.0073223], abs=1e-7)


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_mixing_equals_torchvision_on_batches_of_two(kind, monkeypatch):
    torch.manual_seed(0)
    images, labels = torch.randint(256, (20, 3, 32, 32)).byte(), torch.randint(10, (20,))
    theirs = getattr(v2, kind)(alpha=0.7, num_classes=10)
    drawn = [theirs.make_params([images]) for _ in range(10)]
    draws = iter(drawn)
    monkeypatch.setattr(theirs, "make_params", lambda _: next(draws))
    pairs = zip((images.float() / 255).split(2), labels.split(2))
    expected = [torch.cat(parts) for parts in zip(*(theirs(*pair) for pair in pairs))]
    box = torch.tensor([draw.get("box", (5, 5, 5, 5)) for draw in drawn]).repeat_interleave(2, 0)
    weight = torch.tensor([draw.get("lam", draw.get("lam_adjusted")) for draw in drawn])
    weight = weight.repeat_interleave(2)
    parameters = {"box_columns": box[:, [0, 2]], "box_rows": box[:, [1, 3]]}
    parameters["pixel_weight"] = weight if kind == "MixUp" else torch.ones(20)
    mixed = data.mix_images(images.float() / 255, parameters), data.mix_labels(labels, weight, 10)
    for ours, reference in zip(mixed, expected):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)


def test_mixing_weights_are_distributed_as_beta_and_as_torchvisions():
    torch.manual_seed(0)
    theirs, images = v2.CutMix(alpha=0.7, num_classes=10), torch.zeros(2, 3, 32, 32)
    expected = [theirs.make_params([images])["lam_adjusted"] for _ in range(4000)]
    mixup = data.draw_mixing(0.4, 0, 4000, 32, seed=1)["label_weight"]
    cutmix = data.draw_mixing(0, 0.7, 4000, 32, seed=1)["label_weight"]
    assert stats.kstest(mixup, stats.beta(0.4, 0.4).cdf).pvalue > 0.01
    assert stats.ks_2samp(cutmix, expected).pvalue > 0.01
    both = data.draw_mixing(2.0, 0.7, 4000, 32, seed=1)
    blended, weight = both["pixel_weight"] < 1, both["label_weight"]
    assert abs(blended.sum().item() - 2000) < 3 * math.sqrt(4000 / 4)  # half each
    assert torch.equal(both["pixel_weight"][blended], weight[blended])
    assert stats.kstest(weight[blended], stats.beta(2, 2).cdf).pvalue > 0.01
    assert stats.ks_2samp(weight[~blended], expected).pvalue > 0.01
    area = (both["box_rows"].diff(dim=1) * both["box_columns"].diff(dim=1))[:, 0]
    assert not area[blended].any() and torch.equal(1 - area[~blended] / 1024, weight[~blended])


def test_partners_never_cross_the_slice_of_a_process():
    """Every image has a label of its own, so that the labels of a pair tell who is in it."""
    args = settings(**AUGMENTATION, mixup=1.0, cutmix=1.0, batch_size=8)
    split = data.Split(data.read_digits("train")[0].images[:20], torch.arange(20))
    loaders = [data.TrainLoader(split, args, *place) for place in ((0, 1), (0, 2), (1, 2))]
    steps = list(zip(*(loader.epoch(3) for loader in loaders)))
    assert len(steps) == 2
    for whole, *shares in steps:
        for one, parts in zip(whole, zip(*shares)):
            torch.testing.assert_close(torch.cat(parts), one, rtol=0, atol=1e-6)
        for _, labels in shares:
            assert labels.shape == (4, 20)
            assert ((labels[0::2] + labels[1::2] > 0).sum(1) == 2).all()
    assert data.TrainLoader(split.select(slice(19)), settings(mixup=1.0)).batch_size == 18


def test_loss_of_smoothed_and_mixed_labels_by_hand():
    """-log p of each class k is CE(k); smoothing by 0.2 takes 0.8 CE(label) + 0.2 mean CE."""
    images, a = torch.eye(4, 6), torch.tensor([0, 2, 1, 1])
    weight, b = torch.tensor([0.7, 0.2, 1, 0]), a[[1, 0, 3, 2]]
    for smoothing, mixed in ((0.0, False), (0.2, False), (0.0, True), (0.2, True)):
        args, run, _ = linear_run(nn.Linear(6, 3), label_smoothing=smoothing)
        logits = run.model(images)
        losses = logits.logsumexp(1, keepdim=True) - logits
        losses = (1 - smoothing) * losses + smoothing * losses.mean(1, keepdim=True)
        of_a, of_b = losses[range(4), a], losses[range(4), b]
        expected = (weight * of_a + (1 - weight) * of_b if mixed else of_a).mean().item()
        labels = data.mix_labels(a, weight, 3) if mixed else a
        loss, _ = train.train_step(run, images, labels, args)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_training_accuracy_counts_the_label_of_the_larger_weight():
    labels = data.mix_labels(torch.arange(4), torch.tensor([0.9, 0.6, 0.3, 0.7]), 4)
    for predicted, expected in (([0, 1, 2, 3], 3), ([1, 0, 3, 2], 1), ([2, 3, 0, 1], 0)):
        args, run, _ = linear_run(nn.Linear(4, 4, bias=False))
        nn.init.eye_(run.model.weight)
        assert train.train_step(run, torch.eye(4)[predicted], labels, args)[1] == expected


def test_cosine_rates_by_hand():
    """Three epochs of three steps, half an epoch of warm-up; a step's rate is that of its middle.

    At t epochs it is 0.1 t / 0.5, then 0.1 (1 + cos(72 degrees (t - 0.5))) / 2.
    """
    cosine = {"schedule": "cosine", "warmup_epochs": 0.5, "epochs": 3, "learning_rate": 0.1}
    args, run, loader = linear_run(nn.Linear(6, 3), **cosine)
    rates = []
    run.optimizer.register_step_pre_hook(lambda sgd, *_: rates.append(sgd.param_groups[0]["lr"]))
    rows = [train.train_one_epoch(run, loader, epoch, args) for epoch in (1, 2, 3)]
    # t = 1/6, 3/2 and 17/6: a third of the way up, cosines of 72 and 168 degrees
    expected = [0.03333333, 0.06545085, 0.00109262]
    assert len(rates) == 9 and rates[::4] == pytest.approx(expected, abs=1e-8)
    middles = [0.1, 0.06545085, 0.00954915]  # t = 1/2, 3/2, 5/2: cosines of 0, 72, 144 degrees
    assert [row["learning_rate"] for row in rows] == pytest.approx(middles, abs=1e-8)


def test_early_stopping_applies_to_a_cosine_but_no_drop_of_the_rate():
    patience = {"early_stopping_patience": 2, "scheduler_patience": 0}
    args, run, loader = linear_run(nn.Linear(6, 3), schedule="cosine", epochs=9, **patience)
    history, stops = [], []
    for epoch, loss in enumerate([3.0, 2.0, 2.5, 2.0], start=1):
        history.append(train.train_one_epoch(run, loader, epoch, args))
        history[-1] |= {"epoch": epoch, "val_loss": loss}
        train.finish_epoch(run, history, args)
        stops.append(train.should_stop(history, args))
    assert stops == [False, False, False, True]
    expected = [0.01 * (1 + math.cos(math.pi * (epoch + 0.5) / 9)) / 2 for epoch in range(4)]
    assert [row["learning_rate"] for row in history] == pytest.approx(expected)


def test_average_follows_the_recursion_by_hand():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    args, run, loader = linear_run(network, ema_decay=0.75, learning_rate=0.5)
    expected = {name: x.double() for name, x in network.state_dict().items()}

    decays = iter([2 / 11, 3 / 12, 4 / 13])  # (1 + steps) / (10 + steps), below 0.75

    def follow(*_):
        decay = next(decays)
        for name, x in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * x.double()

    run.optimizer.register_step_post_hook(follow)
    train.train_one_epoch(run, loader, 1, args)
    expected["1.num_batches_tracked"] = torch.tensor(3.0)  # an integer is copied
    average = run.parts()["model"].state_dict()
    assert average.keys() == network.state_dict().keys()
    for name, x in average.items():
        torch.testing.assert_close(x.double(), expected[name].double(), rtol=0, atol=1e-6)
    assert (average["1.running_mean"] - network[1].running_mean).abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_uses_and_keeps_its_statistics_while_its_weights_train(frozen):
    args, run, loader = small_run(freeze_batch_norm=frozen)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    images, labels = next(loader.epoch(1))
    with torch.no_grad():
        expected = F.cross_entropy(run.model.eval()(images), labels).item()
    row = train.train_one_epoch(run, loader, 1, args)
    assert (row["train_loss"] == pytest.approx(expected, rel=1e-9)) == frozen
    for name, x in run.model.state_dict().items():
        is_statistic = "running" in name or "num_batches" in name
        assert torch.equal(x, before[name]) == (frozen and is_statistic), name


@pytest.mark.parametrize("count", [0, 1, 4])
def test_frozen_stages_keep_weights_and_statistics_while_the_others_change(count):
    args, run, loader = small_run(freeze_stages=count)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    train.train_one_epoch(run, loader, 1, args)
    constant = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")[: 2 + count if count else 0]
    for name, x in run.model.state_dict().items():
        assert torch.equal(x, before[name]) == (name.split(".")[0] in constant), name


def work(path: Path) -> None:
    """Trains with all recipes, as one process of one or two; the first writes what it got.

    Batch norm is frozen and there is no dropout: whatever else differs is a mistake.
    """
    processes = utils.this_process()
    utils.connect("cpu")
    rank, world_size = processes.rank, processes.world_size
    recipes = RECIPES | {"batch_size": 4, "learning_rate": 0.001}
    recipes |= {"freeze_batch_norm": True, "freeze_stages": 1}
    args, run, loader = small_run(rank, world_size, **recipes)
    test = data.read_digits("test")[0].select(slice(rank, 31, world_size))
    rows = [train.train_head(run, loader, args)]
    rows += [train.train_one_epoch(run, loader, epoch, args) for epoch in (1, 2)]
    for statistic in run.validated.buffers():
        statistic.add_(rank)  # only those of rank 0 count
    rows += [train.validate(run, data.EvalLoader(test.images, 3, 32), test.labels)]
    states = [run.model.state_dict(), run.average.state_dict()]
    if rank == 0:
        torch.save({"world_size": world_size, "rows": rows, "states": states}, path)
    utils.disconnect()


def test_two_processes_equal_one_with_all_recipes_in_float64(tmp_path):
    port = find_free_port()
    roles = [functools.partial(be_one_of_two, rank, port) for rank in (0, 1)]
    scripts = [Script(__file__, "2.pt", cwd=tmp_path, prepare=role) for role in roles]
    work(tmp_path / "1.pt")
    assert [script.wait() for script in scripts] == [0, 0], scripts[1].stderr
    one, two = (load(tmp_path / name) for name in ("1.pt", "2.pt"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for ours, theirs in zip(two["rows"], one["rows"], strict=True):
        for name in ours.keys() - {"images_per_second", "head"}:
            assert ours[name] == pytest.approx(theirs[name], rel=0, abs=1e-9), name
    torch.testing.assert_close(two["states"], one["states"], rtol=0, atol=1e-9)


# Beyond the range of each constant, then combinations that do not go together: what is refused.
EDGES = {
    "head-epochs": "-1 100001 1.5 nan x",
    "head-learning-rate": "0 -0.1 nan inf 1e30 x",
    "schedule": "x COSINE",
    "warmup-epochs": "-0.5 nan inf x",
    "label-smoothing": "-0.1 1.1 nan x",
    "ema-decay": "-0.1 0.99999 nan x",
    "mixup": "-0.1 101 nan inf x",
    "cutmix": "-0.1 101 nan inf x",
    "freeze-stages": "-1 5 1.5 x",
    "freeze-batch-norm": "1",
}
TOGETHER = [
    ({"epochs": 0}, 1, "--epochs 0: expected 1 or more without --head-epochs"),
    ({"warmup_epochs": 1.0}, 1, "--warmup-epochs 1.0: expected 0 with --schedule plateau"),
    (COSINE | {"warmup_epochs": 2.0}, 1, "--warmup-epochs 2.0: expected less than 2 epochs"),
    ({"mixup": 1.0, "batch_size": 7}, 1, "--batch-size 7: expected an even number of images per "),
    ({"cutmix": 1.0, "batch_size": 6}, 2, "--batch-size 6: expected an even number of images per "),
]


@pytest.mark.parametrize("flag", EDGES)
def test_flag_of_a_recipe_beyond_its_edge_is_one_line_and_exit_status_2(flag, capsys):
    for value in [*EDGES[flag].split(), ""]:
        with pytest.raises(SystemExit) as end:
            train.main([f"--{flag}={value}"])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and f"--{flag}" in err


@pytest.mark.parametrize(("changed", "processes", "message"), TOGETHER)
def test_recipes_that_do_not_go_together_are_refused(changed, processes, message, capsys):
    with pytest.raises(SystemExit) as end:
        train.check_combinations(settings(**changed), processes)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and message in err


def test_recipes_that_go_together_are_allowed():
    edges = ["--label-smoothing=1", "--ema-decay=0.9999", "--mixup=100", "--cutmix=100"]
    assert utils.parse_flags(train.__file__, edges).ema_decay == 0.9999
    for changed in ({"epochs": 0, "head_epochs": 1}, COSINE | {"warmup_epochs": 1.99}):
        train.check_combinations(settings(**changed), 1)
    train.check_combinations(settings(mixup=1.0, batch_size=8), 2)


def test_too_few_images_to_mix_or_of_a_class_are_one_message():
    cpu = torch.device("cpu")
    for changed, processes, message in (
        ({"train_per_class": 1, "mixup": 1.0}, utils.Processes(world_size=8), "too few for 8"),
        (
            {"holdout_per_class": 144},
            utils.Processes(),
            "Class . has 1.. training images: expected",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            args = settings(dataset="digits", **changed)
            train_split, val_split, _ = train.read_data(args, processes)
            train.make_loaders(args, processes, cpu, train_split, val_split)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
