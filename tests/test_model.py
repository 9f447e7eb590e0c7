"""The network and its weights."""

import functools
from pathlib import Path

import pytest
import torch
import torchvision
from rescale_weights import rescale
from scripts import settings
from torch import nn

import data
import model as resnet
import train
import utils


def test_head_is_linear_512_relu_dropout_linear():
    network = resnet.build_model("resnet50", 100)
    kinds = [type(layer) for layer in network.fc]
    assert kinds == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert network.fc[0].weight.shape == (512, 2048) and network.fc[3].weight.shape == (100, 512)
    assert network.fc[2].p == 0.5
    assert sum(parameter.numel() for parameter in network.parameters()) == 24_608_420


def test_head_stays_in_float32_under_autocast():
    network = resnet.build_model("resnet50", 10).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        logits = network(torch.randn(2, 3, 32, 32))
        assert network.layer4(torch.randn(1, 1024, 2, 2)).dtype == torch.bfloat16
    assert logits.dtype == torch.float32


@functools.cache
def random_weights() -> dict:
    """A state_dict in torchvision's layout."""
    return torchvision.models.resnet50().state_dict()


def load(weights: object) -> nn.Module:
    """A new ResNet-50 for 100 classes with these WEIGHTS."""
    network = resnet.build_model("resnet50", 100)
    train.load_weights(network, settings(weights=str(weights)), data.CLASSES)
    return network


def test_weights_file_fills_everything_but_the_head(tmp_path):
    torch.save(random_weights(), tmp_path / "weights.pth")
    ours = load(tmp_path / "weights.pth").state_dict()
    for name, tensor in random_weights().items():
        assert name.startswith("fc.") or torch.equal(ours[name], tensor), name


def test_default_weights_are_torchvisions_file_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    expected = random_weights()
    file = (
        tmp_path
        / "hub"
        / "checkpoints"
        / Path(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url).name
    )
    file.parent.mkdir(parents=True)
    torch.save(expected, file)
    args = utils.parse_flags(train.__file__, [])
    found = train.make_model(args, ["cat", "dog"], torch.device("cpu"), pretrained=True)
    for name, tensor in found.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, expected[name]), name


def test_weights_in_torchs_older_format_are_read(tmp_path):
    torch.save(random_weights(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load(tmp_path / "w.pth").conv1.weight, random_weights()["conv1.weight"])


def test_real_imagenet_weights_give_the_features_of_torchvisions_resnet50(imagenet_weights):
    theirs = torchvision.models.resnet50()
    theirs.load_state_dict(torch.load(imagenet_weights, weights_only=True))
    theirs.fc = nn.Identity()
    ours = load(imagenet_weights)
    ours.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


MISFITS = {
    "missing": lambda state: state.pop("layer1.0.conv1.weight"),
    "unexpected": lambda state: state.update({"layer9.weight": torch.zeros(1)}),
    "size mismatch": lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
}


@pytest.mark.parametrize("change", MISFITS)
def test_weights_that_do_not_fit_are_refused_with_the_entry_named(tmp_path, change):
    state = {**random_weights()}
    MISFITS[change](state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(utils.UserError, match=f"(?is)does not fit resnet50: {change}"):
        load(tmp_path / "weights.pth")


def test_weights_that_are_neither_name_nor_file_are_refused():
    with pytest.raises(utils.UserError, match="IMAGENET1K_V9 not found. Expected IMAGENET1K_V1"):
        load("IMAGENET1K_V9")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_weights_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(utils.UserError, match=r"weights.pth is not a state_dict file"):
        load(tmp_path / "weights.pth")


def test_predict_gives_every_image_its_logits_in_order():
    torch.manual_seed(0)
    network = resnet.build_model("resnet50", 10).train()
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    loader = data.EvalLoader(images, 3, 32)
    logits = resnet.predict(network, loader, torch.float32)
    assert logits.shape == (7, 10)
    with torch.inference_mode():
        last = network.eval()(data.NormalizeAndResize(32, torch.device("cpu"))(images[6:] / 255))
    torch.testing.assert_close(logits[6:], last)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_rescaled_weights_compute_the_same_at_the_norms_of_the_initialization(architecture):
    torch.manual_seed(0)
    network, images = torchvision.models.get_model(architecture), torch.randn(2, 3, 64, 64)
    initial = {name: x.norm().item() for name, x in network.state_dict().items() if x.ndim == 4}
    for module in network.modules():
        module.momentum = 1.0  # batch norm takes the statistics of these images
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(torch.empty(()).uniform_(2, 20))
    with torch.inference_mode():
        network.train()(images)
        expected = network.eval()(images)
        rescaled = rescale(network.state_dict())
        assert not torch.equal(rescaled["conv1.weight"], network.conv1.weight)
        network.load_state_dict(rescaled)
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-3)
    for name, norm in initial.items():
        assert rescaled[name].norm().item() == pytest.approx(norm, rel=0.05), name
