"""The network and its weights."""

import math
from pathlib import Path

import pytest
import torch
from rescale_weights import rescale
from scripts import settings
from torch import nn
from torchvision.models import ResNet50_Weights, resnet18, resnet50

import data
import model as resnet
import utils


def test_head_is_linear_512_relu_dropout_linear():
    network = resnet.build_model("resnet50", 100)
    kinds = [type(layer) for layer in network.fc]
    assert kinds == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert network.fc[0].weight.shape == (512, 2048) and network.fc[3].weight.shape == (100, 512)
    assert network.fc[2].p == 0.5
    assert sum(parameter.numel() for parameter in network.parameters()) == 24_608_420


def test_head_stays_in_float32_under_autocast():
    network = resnet.build_model("resnet18", 10).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        logits = network(torch.randn(2, 3, 32, 32))
        assert network.layer4(torch.randn(1, 256, 2, 2)).dtype == torch.bfloat16
    assert logits.dtype == torch.float32


def load(weights: object, architecture: str = "resnet18") -> nn.Module:
    """A new network for two classes with these WEIGHTS."""
    args = settings(architecture=architecture, weights=str(weights))
    return resnet.make_model(args, ["cat", "dog"], torch.device("cpu"), pretrained=True)


def test_default_weights_or_a_file_fill_everything_but_the_head(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url, state = ResNet50_Weights.IMAGENET1K_V2.url, resnet50().state_dict()
    file, older = tmp_path / "hub" / "checkpoints" / Path(url).name, tmp_path / "older.pth"
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    torch.save(state, older, _use_new_zipfile_serialization=False)  # torch's format before 2020
    for weights in (settings().weights, file, older):
        ours = load(weights, settings().architecture).state_dict()
        for name, tensor in state.items():
            assert name.startswith("fc.") or torch.equal(ours[name], tensor), name


def test_real_imagenet_weights_give_the_features_of_torchvisions_resnet50(imagenet_weights):
    theirs = resnet50()
    theirs.load_state_dict(torch.load(imagenet_weights, weights_only=True))
    ours = load(imagenet_weights, "resnet50")
    ours.fc = theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_weights_that_do_not_fit_or_are_damaged_are_one_message(tmp_path):
    state, path = resnet18().state_dict(), tmp_path / "weights.pth"
    torch.save(state, path)
    flipped, others, kernel = bytearray(path.read_bytes()), dict(state), state["conv1.weight"]
    flipped[len(flipped) // 2] ^= 64
    del others["conv1.weight"]
    misfit, unusable = "does not fit resnet18: ", "is not a state_dict file that can be used: "
    for content, message in (
        (others, f"{misfit}missing"),
        (state | {"layer9.weight": kernel}, f"{misfit}unexpected"),
        (state | {"conv1.weight": kernel[..., :3]}, f"{misfit}size mismatch"),
        (state | {"conv1.weight": kernel * math.nan}, f"{unusable}its weights are not finite"),
        (flipped, f"{unusable}.* fails its checksum"),
        (flipped[: len(flipped) // 2], unusable),
        (b"text", unusable),
        (b"", unusable),
    ):
        torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
        with pytest.raises(utils.UserError, match=f"(?i)weights.pth {message}") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_weights_are_found_within_what_checkpoints_wrap_them_in(tmp_path):
    state, path = resnet18().state_dict(), tmp_path / "weights.pth"
    parallel = {f"module.{name}": x for name, x in state.items()}
    compiled = {f"module._orig_mod.{name}": x for name, x in state.items()}
    lightning = {f"model.{name}": x for name, x in state.items()}
    for content in (
        {"state_dict": parallel, "epoch": 90, "arch": "resnet18", "best_acc1": 69.8},
        {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        {"model_state_dict": compiled, "loss": 0.1},
        {"state_dict": lightning, "pytorch-lightning_version": "2.0.0"},
        parallel,
    ):
        torch.save(content, path)
        ours = load(path).state_dict()
        for name, tensor in state.items():
            assert name.startswith("fc.") or torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d",
            "a Git LFS pointer",
        ),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "a safetensors file. Convert it: "),
        ("a.pth", b"\n<!DOCTYPE html><html>Sign in</html>", "a web page. Download the file itself"),
        ("a.pth", nn.Linear(1, 1), "more than tensors, such as a whole model. Expected what"),
        ("a.pth", b"text", "it is damaged, or holds more than tensors"),
        ("a.pth", {"epoch": 3, "net": {}}, "its entry 'epoch' is int, not a tensor"),
        ("a.pth", [torch.zeros(3)], "it holds list, not tensors by their names"),
        ("a.pth", {"state_dict": {}}, "it holds dict, not tensors by their names"),
        ("a.pth", torch.zeros(3), "it holds Tensor, not tensors by their names"),
    ],
)
def test_file_that_is_no_state_dict_is_explained_in_our_own_words(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(utils.UserError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path} is not a state_dict file that can be used: ")
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_damaged_download_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = resnet.weights_path("resnet18", "IMAGENET1K_V1")
    file.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), file)
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(utils.UserError, match="Delete it: it will be downloaded") as error:
        load("IMAGENET1K_V1")
    assert str(error.value).startswith(f"{file} is not a state_dict file")


def test_download_without_a_home_folder_says_so_and_makes_none(tmp_path, monkeypatch):
    """As in a container that runs as a user whom the system does not know."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError
    with pytest.raises(utils.UserError, match="no home folder to store them in. Set HOME, or"):
        load("IMAGENET1K_V1")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_neither_name_nor_file_are_refused():
    with pytest.raises(utils.UserError, match="IMAGENET1K_V9 not found. Expected IMAGENET1K_V1"):
        load("IMAGENET1K_V9")


def test_predict_gives_every_image_its_logits_in_order():
    torch.manual_seed(0)
    network = resnet.build_model("resnet18", 10).train()
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    logits = resnet.predict(network, data.EvalLoader(images, 3, 32), torch.float32)
    assert logits.shape == (7, 10)
    with torch.inference_mode():
        alone = network.eval()(data.NormalizeAndResize(32, torch.device("cpu"))(images / 255))
    torch.testing.assert_close(logits, alone)


def test_rescaled_weights_compute_the_same_at_the_norms_of_the_initialization():
    torch.manual_seed(0)
    network, images = resnet50(), torch.randn(2, 3, 64, 64)
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
