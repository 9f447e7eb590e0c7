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


def drawn_in(monkeypatch, seed: int, epoch: int) -> tuple[dict, list]:
    """The parameters of an epoch of 24 images in 4 batches, and the order of the jitter in each."""
    seen, orders = [], []
    draw, augment = data.draw_parameters, data.augment
    with monkeypatch.context() as patch:
        patch.setattr(data, "draw_parameters", lambda *args: seen.append(draw(*args)) or seen[-1])
        patch.setattr(data, "augment", lambda *args: orders.append(args[-1]) or augment(*args))
        split = data.Split(torch.zeros(24, 3, 32, 32, dtype=torch.uint8), torch.arange(24) % 3)
        args = settings(**AUGMENTATION, mixup=0.4, cutmix=1.0, batch_size=6, seed=seed)
        assert len(list(data.TrainLoader(split, args).epoch(epoch))) == 4
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


def test_dropout_differs_between_seeds_epochs_and_processes_and_is_repeatable():
    def dropped(seed: int, epoch: int, rank: int) -> list:
        """Where dropout leaves zeros in an epoch of two steps."""
        args = settings(batch_size=20, seed=seed)
        split = data.Split(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.arange(40) % 3)
        network, zeros = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3), nn.Dropout()), []
        network.register_forward_hook(lambda _, __, logits: zeros.append((logits == 0).tolist()))
        run, loader = train.make_run(args, network, "fp32"), data.TrainLoader(split, args, rank, 2)
        train.train_one_epoch(run, loader, epoch, args)
        return zeros

    base = dropped(0, 1, 0)
    assert dropped(0, 1, 0) == base
    for where in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):
        assert dropped(*where) != base, where


def test_new_layers_are_those_of_the_seed_whatever_was_drawn_before():
    heads = []
    for seed in (0, 0, 1):
        torch.seed()
        args = settings(architecture="resnet18", weights="", seed=seed)
        network = resnet.make_model(args, ["a", "b"], torch.device("cpu"), pretrained=True)
        heads.append(network.fc[3].weight)
    assert heads[0].equal(heads[1]) and not heads[0].equal(heads[2])


def test_head_sees_the_images_in_another_order_in_each_of_its_epochs():
    seen, features = [], torch.arange(30.0)[:, None].expand(30, 4) / 30
    for seed in (0, 1):
        head = resnet.Head(4, 3)
        head.register_forward_pre_hook(lambda _, batch: seen.extend(batch[0][:, 0].tolist()))
        args = settings(batch_size=10, head_epochs=2, seed=seed)
        train.fit_head(head, features, torch.arange(30) % 3, args)
    orders = torch.tensor(seen).view(4, 30)
    assert (orders.sort(1).values == features[:, 0]).all()
    assert len(orders.unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("watch", "other", "bests", "rates"),
    [
        ("accuracy", "loss", [True, True, True, False, False], [1, 1, 1, 0.5, 0.25]),
        ("loss", "accuracy", [True, False, False, False, False], [1, 0.5, 0.25, 0.125, 0.0625]),
    ],
)
def test_schedule_and_best_epoch_follow_what_is_watched(watch, other, bests, rates):
    """What is watched rises for three epochs and then falls; the other rises all the time."""
    args = settings(watch=watch, scheduler_patience=0, scheduler_factor=0.5, learning_rate=1.0)
    run = train.make_run(args, nn.Linear(2, 2), "fp32")
    history = []
    for epoch, value in enumerate((0.1, 0.2, 0.3, 0.25, 0.2)):
        row = {"epoch": epoch, f"val_{watch}": value, f"val_{other}": epoch, "learning_rate": 1.0}
        history.append(row)
        assert train.finish_epoch(run, history, args) == bests[epoch]
        assert run.optimizer.param_groups[0]["lr"] == rates[epoch]


def test_weight_decay_and_momentum_are_those_of_the_constants():
    """Two steps from 1 without a gradient but that of the decay, of 0.1 and 0.5 * 0.1 + 0.098."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = train.make_optimizer(layer, 0.2, settings(weight_decay=0.1, momentum=0.5))
    layer.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    optimizer.step()
    assert layer.weight.item() == pytest.approx(1 - 0.2 * 0.1 - 0.2 * 0.148)


def test_labels_are_part_of_what_identifies_pictures():
    images, names = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), []
    for labels in ([0, 0, 1, 1], [0, 1, 0, 1]):
        split = data.Split(images, torch.tensor(labels))
        names.append(data.identify(Namespace(dataset="photos"), split))
    assert names[0] != names[1] and names[0].startswith("4 pictures, crc32 ")
