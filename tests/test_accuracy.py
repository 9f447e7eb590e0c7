"""What train.py learns, in whole runs with a ResNet-50: accuracies that only a right product reaches.

The longest of all tests: collected first, it runs while another process runs the others.
"""

import re
from pathlib import Path

import pytest
from scripts import Script

pytestmark = pytest.mark.slow


def train_to_the_end(folder: Path, *flags: str) -> tuple[Script, float]:
    """The run, and the validation accuracy in per cent of its best epoch as it prints it."""
    script = Script("train.py", *flags, cwd=folder)
    assert script.wait(900) == 0, script.stderr
    return script, float(re.search(r"^best .* accuracy ([\d.]+) %", script.stdout, re.MULTILINE)[1])


def test_demo_learns_to_read_digits(tmp_path):
    assert train_to_the_end(tmp_path, "--demo")[1] >= 90


def test_pretrained_features_are_as_good_as_only_right_preprocessing_makes_them(
    cifar100_dir, imagenet_weights, tmp_path
):
    """39.6 % here; 24.6 if images are not normalized, 34.3 by mean and deviation swapped, 34.3 with
    blue before red, 34.5 if every other pixel is left out, 15.7 padded in place of resized.
    """
    flags = f"--data-dir {cifar100_dir} --weights {imagenet_weights} --epochs 0 --head-epochs 10"
    flags += " --image-size 64 --train-per-class 20 --holdout-per-class 20 --precision fp32"
    script, accuracy = train_to_the_end(tmp_path, *flags.split())
    assert accuracy >= 37
    assert "cifar100: 2,000 training and 2,000 validation images, 100 classes" in script.stdout
    assert "best.pt is selected on the test images" not in script.stdout
    assert script.stdout.endswith(f"next     python evaluate.py --data-dir {cifar100_dir}\n")


def test_cifar100_is_fine_tuned_from_real_weights(cifar100_dir, imagenet_weights, tmp_path):
    flags = f"--data-dir {cifar100_dir} --weights {imagenet_weights} --epochs 1 --batch-size 50"
    flags += " --image-size 32 --train-per-class 1 --holdout-per-class 1 --precision fp32"
    script, _ = train_to_the_end(tmp_path, *flags.split())
    assert "cifar100: 100 training and 100 validation images, 100 classes" in script.stdout
