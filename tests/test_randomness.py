"""What must differ from epoch to epoch, seed to seed and process to process, and what must not."""

import itertools
from argparse import Namespace

import pytest
import torch
from scripts import AUGMENTATION, settings
from torch import nn

import data
import model as resnet
import train

CPU = torch.device("cpu")
MIXED = AUGMENTATION | {"mixup": 0.4, "cutmix": 1.0}


def drawn_in(monkeypatch, seed: int, epoch: int) -> tuple[dict, list]:
    """The parameters of an epoch of 48 images in 4 batches, and the order of the jitter in each."""
    seen, orders = [], []
    draw, augment = data.draw_parameters, data.augment
    with monkeypatch.context() as patch:
        patch.setattr(data, "draw_parameters", lambda *args: seen.append(draw(*args)) or seen[-1])
        patch.setattr(data, "augment", lambda *args: orders.append(args[-1]) or augment(*args))
        images = torch.randint(256, (48, 3, 32, 32), dtype=torch.uint8)
        args = settings(**MIXED, batch_size=12, seed=seed)
        loader = data.TrainLoader(data.Split(images, torch.arange(48) % 3), args)
        assert len(list(loader.epoch(epoch))) == 4
    (parameters,) = seen
    return parameters, orders


def test_every_parameter_differs_between_epochs_and_between_seeds(monkeypatch):
    drawn = [drawn_in(monkeypatch, *where) for where in ((0, 1), (0, 2), (1, 1), (1, 2))]
    names = {"flip", "top", "left", "brightness", "contrast", "saturation", "hue", "angle"}
    names |= {"box", "grayscale", "pixel_weight", "box_rows", "box_columns", "label_weight"}
    for (one, orders), (other, other_orders) in itertools.combinations(drawn, 2):
        assert one.keys() == other.keys() == names
        assert not [name for name in names if torch.equal(one[name], other[name])]
        assert orders != other_orders
    assert len(set(map(tuple, drawn[0][1]))) > 1  # and the order of the jitter between batches
    again, orders = drawn_in(monkeypatch, 0, 1)
    assert orders == drawn[0][1] and torch.equal(again["hue"], drawn[0][0]["hue"])


class Noise(nn.Module):
    """A network whose logits are what dropout leaves of ones; it keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.dropout, self.seen = nn.Parameter(torch.ones(3)), nn.Dropout(0.5), []

    def forward(self, images):
        self.seen.append(self.dropout(torch.ones(len(images), 3)))
        return self.scale * self.seen[-1]


def dropped(seed: int, epoch: int, rank: int):
    args = settings(batch_size=40, seed=seed, learning_rate=1e-9)
    split = data.Split(torch.zeros(80, 3, 32, 32, dtype=torch.uint8), torch.arange(80) % 3)
    run = train.make_run(args, Noise(), "fp32")
    train.train_one_epoch(run, data.TrainLoader(split, args, rank, 2), epoch, args)
    return torch.cat(run.model.seen)


def test_dropout_differs_between_seeds_epochs_and_processes_and_is_repeatable():
    base = dropped(0, 1, 0)
    assert torch.equal(base, dropped(0, 1, 0))
    for where in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):
        assert not torch.equal(base, dropped(*where)), where


def test_new_layers_are_those_of_the_seed_whatever_was_drawn_before():
    def head(seed: int):
        torch.seed()
        args = settings(architecture="resnet18", weights="", seed=seed)
        return train.make_model(args, ["a", "b"], CPU, pretrained=True).fc[3].weight.detach()

    assert torch.equal(head(0), head(0)) and not torch.equal(head(0), head(1))


def test_head_sees_the_images_in_another_order_in_each_of_its_epochs():
    seen = []

    class Watched(resnet.Head):
        def forward(self, features):
            seen.append(features[:, 0].tolist())
            return super().forward(features)

    features = torch.arange(30.0)[:, None].expand(30, 4) / 30
    for seed in (0, 1):
        args = settings(batch_size=10, head_epochs=2, seed=seed)
        train.fit_head(Watched(4, 3), features, torch.arange(30) % 3, args)
    orders = [[*itertools.chain(*seen[start : start + 3])] for start in range(0, 12, 3)]
    assert all(sorted(order) == features[:, 0].tolist() for order in orders)
    assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize(("watch", "other"), [("accuracy", "loss"), ("loss", "accuracy")])
def test_schedule_and_best_epoch_follow_what_is_watched(watch, other):
    """What is watched rises for three epochs and then falls; the other rises all the time."""
    args = settings(watch=watch, scheduler_patience=0, scheduler_factor=0.5, learning_rate=1.0)
    run = train.make_run(args, nn.Linear(2, 2), "fp32")
    history, rates, best = [], [], []
    for epoch, value in enumerate((0.1, 0.2, 0.3, 0.25, 0.2), start=1):
        row = {"epoch": epoch, f"val_{watch}": value, f"val_{other}": epoch, "learning_rate": 1.0}
        history.append(row)
        best.append(train.finish_epoch(run, history, args))
        rates.append(run.optimizer.param_groups[0]["lr"])
    if watch == "accuracy":
        assert best == [True, True, True, False, False]
        assert rates == [1, 1, 1, 0.5, 0.25]
    else:
        assert best == [True, False, False, False, False]
        assert rates == [1, 0.5, 0.25, 0.125, 0.0625]


def test_weight_decay_and_momentum_are_those_of_the_constants():
    """Two steps without a gradient but that of the decay: v = d * w; w -= lr * v; v = m * v + ..."""
    args = settings(weight_decay=0.1, momentum=0.5, learning_rate=0.2)
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer, weight, velocity = train.make_optimizer(layer, 0.2, args), 1.0, 0.0
    for _ in range(2):
        layer.weight.grad = torch.zeros(1, 1)
        optimizer.step()
        velocity = 0.5 * velocity + 0.1 * weight
        weight -= 0.2 * velocity
    assert layer.weight.item() == pytest.approx(weight)


def test_labels_and_classes_are_part_of_what_identifies_pictures():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    folder = Namespace(dataset="photos")
    one, other = (
        data.identify(folder, data.Split(images, torch.tensor(labels)))
        for labels in ([0, 0, 1, 1], [0, 1, 0, 1])
    )
    assert one != other and one.startswith("4 pictures, crc32 ")
