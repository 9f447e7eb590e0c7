"""A folder of pictures in place of CIFAR-100: how it is read, trained on, evaluated and refused."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import TINY, run_script, settings
from torchvision.transforms.v2 import functional

import data
import train

CPU = torch.device("cpu")
SIZE = ["--stored-size", "40"]


def write_pictures(folder: Path, split: data.Split, names: list[str]) -> Path:
    """Writes each image as a PNG into the sub-folder of its class; file names sort as images do."""
    for index, (image, label) in enumerate(zip(split.images, split.labels)):
        path = folder / names[label] / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    """Zeros and ones: 12 to train on, 6 in val/, per class."""
    folder = tmp_path / "photos"
    for part, count in (("train", 12), ("val", 6)):
        digits, _ = data.read_digits("train" if part == "train" else "test")
        for label, name in enumerate(["one", "zero"]):
            chosen = digits.select(digits.labels == 1 - label).select(slice(count))
            split = data.Split(chosen.images, torch.full_like(chosen.labels, label))
            write_pictures(folder / part, split, ["one", "zero"])
    return folder


def read(folder: Path, size: int = 32, **changed) -> tuple[data.Split, list[str]]:
    listing, classes = data.list_pictures(folder)
    place = settings(stored_size=size, data_dir=str(folder.parent / "decoded"), **changed)
    return data.load(listing, "val", place), classes


# ---- reading ------------------------------------------------------------------------------------


def test_cifar100_as_a_folder_of_pictures_gives_the_same_tensors(cifar100_dir, tmp_path):
    test, classes = data.read_cifar100(cifar100_dir, "test")
    chosen = test.select(test.labels < 10)
    split, names = read(write_pictures(tmp_path / "val", chosen, classes))
    order = chosen.labels.argsort(stable=True)
    assert names == classes[:10] and len(split.labels) == 1000
    assert torch.equal(split.images, chosen.images[order])
    assert torch.equal(split.labels, chosen.labels[order])


def test_pictures_of_every_size_and_mode_are_read_and_broken_ones_named(tmp_path, capsys):
    """The left half is dark, the right half bright, in every one that can be read."""
    ramp = np.where(np.arange(90) < 45, 50, 200).astype(np.uint8)
    gray = Image.fromarray(np.tile(ramp, (60, 1)))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: stored a quarter turn to the left
    gray.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a/turned.jpg", exif=exif)
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png"),
                         ("CMYK", "jpg"), ("RGB", "webp"), ("YCbCr", "tif")):  # fmt: skip
        gray.convert(mode).save(tmp_path / f"a/{mode}.{suffix}")
    Image.fromarray(np.tile(ramp.astype(np.uint16) * 257, (60, 1))).save(tmp_path / "a/16bit.png")
    gray.resize((900, 600)).save(tmp_path / "b/large.jpg")
    gray.resize((9, 6)).save(tmp_path / "b/small.bmp")
    whole = (tmp_path / "b/large.jpg").read_bytes()
    (tmp_path / "b/corrupt.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b/empty.png").touch()
    (tmp_path / "b/notes.txt").write_text("no picture")

    split, names = read(tmp_path, 24)
    assert names == ["a", "b"] and split.labels.bincount().tolist() == [10, 2]
    assert split.images.shape == (12, 3, 24, 24) and split.images.dtype == torch.uint8
    dark, bright = split.images[..., :9], split.images[..., 15:]
    one_bit = sorted(path.name for path in (tmp_path / "a").iterdir()).index("1.png")
    others = [index for index in range(12) if index != one_bit]  # dithered: only its means count
    assert dark[others].float().sub(50).abs().max() < 12
    assert bright[others].float().sub(200).abs().max() < 12
    assert dark[one_bit].float().mean() < 100 < bright[one_bit].float().mean()
    skipped = sorted(capsys.readouterr().err.splitlines())
    expected = [f"skipped  {tmp_path / 'b' / name}" for name in ("corrupt.jpg", "empty.png")]
    assert [line.split(": ")[0] for line in skipped] == [f"ignored  {tmp_path}", *expected]


def test_folders_that_people_have_are_read_as_they_expect(tmp_path, capsys):
    """Seven pictures of a and one of b; the rest is hidden, linked twice, or no picture."""
    picture = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    for name in ("a/.ipynb_checkpoints", "a/ä ö", "b/@eaDir", ".thumbnails", "__MACOSX"):
        (tmp_path / name).mkdir(parents=True)
    kinds = {
        "a/2.JFIF": "JPEG",
        "a/lies.png": "GIF",
        "a/nothing": "PNG",
        "a/photo.jpg_large": "JPEG",
    }
    names = [*kinds, "a/1.gif", "a/ä ö/3.Png", "a/new\nline.webp", "b/4.jpg"]
    for name in names:
        picture.save(tmp_path / name, format=kinds.get(name))
    for name in ("a/.ipynb_checkpoints/1.png", "b/@eaDir/4.jpg", "b/._4.png", ".thumbnails/4.png"):
        picture.save(tmp_path / name)
    for name in ("a/notes.txt", "a/phone.HEIC", "b/LICENSE"):
        (tmp_path / name).write_text("no picture")
    os.mkfifo(tmp_path / "b/pipe.png")
    for link in ("a/loop", "a/other loop", "a/ä ö/loop"):
        (tmp_path / link).symlink_to(tmp_path / "a")
    split, classes = read(tmp_path)
    assert classes == ["a", "b"] and split.labels.tolist() == [0] * 7 + [1]
    assert {file.removeprefix(f"{tmp_path.name}/") for file in split.files} == set(names)
    assert (split.images - 100).abs().max() < 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ignored  {tmp_path}: files that are not pictures: ")
    for kind in ("1 .txt", "1 .HEIC", "1 without an ending", "1 .png"):
        assert kind in line


@pytest.mark.parametrize(
    ("values", "top"),
    [
        (np.array([[0, 1000, 4095]], np.uint16), 4095),  # 12 bits
        (np.array([[0, 500, 40000]], np.uint16), 65535),
        (np.array([[0, 128, 255]], np.int32), 255),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), 2**32 - 1),
        (np.array([[0, 0.5, 1]], np.float32), 1),
        (np.array([[np.nan, 100.5, 250]], np.float32), 255),
    ],
)
def test_values_of_many_bits_keep_their_range(values, top, tmp_path):
    Image.fromarray(np.repeat(np.tile(values, (3, 1)), 1, 1)).save(tmp_path / "a.tif")
    gray = data.read_picture(tmp_path / "a.tif", 3)[0, 1]
    expected = np.nan_to_num(values[0].astype(float)) * 255 / top
    assert np.abs(gray.numpy() - expected).max() <= 0.5


def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = [255, 0, 0, 255]  # the second row is black and transparent
    Image.fromarray(pixels).save(tmp_path / "a.png")
    red, white = data.read_picture(tmp_path / "a.png", 2)[:, :, 0].T.tolist()
    assert (red, white) == ([255, 0, 0], [255, 255, 255])


def test_whole_pictures_are_padded_to_squares(photos, tmp_path):
    pixels = np.full((8, 16, 3), 200, np.uint8)
    pixels[:, :4] = 50  # what the centre square leaves out
    for path in (photos / "train").rglob("*.png"):
        Image.fromarray(pixels).save(path)
    centre, whole = (
        read(photos / "train", 16, whole_pictures=x)[0].images[0] for x in (False, True)
    )
    assert centre[:, :, 3:].min() > 195  # bicubic interpolation looks two pixels beyond
    assert whole[:, [0, 3, 12, 15]].max() == 0  # black above and below
    assert torch.equal(whole[0, 8, [0, 15]], torch.tensor([50, 200], dtype=torch.uint8))


def test_pictures_are_decoded_once_until_one_changes(photos, monkeypatch, capsys):
    """Also after a copy to another place, after damage, and for every part and size once."""
    decoded, read_picture = [], data.read_picture
    monkeypatch.setattr(data, "read_picture", lambda *x: decoded.append(x[0]) or read_picture(*x))
    folder = photos.parent / "data" / "decoded"

    def count(**changed) -> int:
        decoded.clear()
        for split in load_splits(photos, **changed)[:2]:
            for name, image in zip(split.files, split.images, strict=True):
                assert torch.equal(read_picture(photos / name, split.images.shape[-1]), image)
        return len(decoded)

    assert count() == 36 and count() == 0
    assert count(stored_size=24) == 36 and count() == 0
    assert count(train_per_class=2) == 4 and count(holdout_per_class=2, train_per_class=3) == 10
    files = sorted(folder.iterdir())
    assert len(files) == 2 * 7 and {path.suffix for path in files} == {".bin", ".json"}

    os.utime(photos / "train/one/00000.png")  # another time
    assert count() == 24 and sorted(folder.iterdir()) != files
    assert len(list(folder.iterdir())) == 2 * 7  # the outdated file is gone
    shutil.copy(photos / "val/one/00000.png", photos / "val/one/new.png")
    assert count() == 13
    path = max(folder.glob("photos-val-32px*.bin"), key=lambda path: path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(b"other")
    assert count() == 13
    os.truncate(path, 1000)
    assert count() == 13
    path.with_suffix(".json").write_text("{")
    assert count() == 13
    assert f"decoded  {path}: 13 pictures, 0.0 MB" in capsys.readouterr().out


def test_images_that_a_plan_chooses_are_those_that_resume_reads(photos):
    (photos / "train/one/00003.png").write_bytes(b"no picture")
    whole, _, facts = load_splits(photos)
    place = {"dataset": str(photos), "data_dir": str(photos.parent / "data"), "stored_size": 32}
    args = settings(**place, train_per_class=5)
    planned = data.select_for_plan(whole, args, facts["classes"])
    resumed, _, _ = load_splits(photos, train_per_class=5)
    assert planned.files == resumed.files and torch.equal(planned.images, resumed.images)


def test_decoding_that_fails_leaves_nothing(photos, monkeypatch):
    monkeypatch.setattr(
        os, "posix_fallocate", lambda *x: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(data.DataError, match="data/decoded: full. See --data-dir"):
        load_splits(photos)
    assert list((photos.parent / "data/decoded").iterdir()) == []


def test_memory_that_runs_out_does_not_skip_pictures(photos, monkeypatch):
    def read_picture(*args):
        raise MemoryError

    monkeypatch.setattr(data, "read_picture", read_picture)
    with pytest.raises(MemoryError):
        read(photos / "train")


def test_a_class_without_pictures_in_val_is_one_that_is_not_validated(photos):
    for path in (photos / "val" / "one").iterdir():
        path.unlink()
    _, val_split, _ = load_splits(photos)
    assert val_split.labels.tolist() == [1] * 6


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_and_looks_the_same(tmp_path, monkeypatch):
    digit = data.read_digits("test")[0].images[0]
    large = functional.to_pil_image(functional.resize(digit, [1200, 1600]))
    large.save(tmp_path / "large.jpg", quality=95)
    decoded, load = [], Image.Image.convert

    def convert(image, *args, **options):
        decoded.append(image.size)
        return load(image, *args, **options)

    monkeypatch.setattr(Image.Image, "convert", convert)
    reduced = data.read_picture(tmp_path / "large.jpg", 64)
    assert (200, 150) in decoded
    large.save(tmp_path / "large.png")
    full = data.read_picture(tmp_path / "large.png", 64)
    assert (reduced.float() - full.float()).abs().mean() < 2


def test_resizing_has_antialiasing_only_where_it_shrinks():
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    mean, std = data.IMAGENET_MEAN, data.IMAGENET_STD
    for size in (32, 40, 96):
        expected = functional.resize(
            functional.normalize(images, mean, std), [size, size], antialias=size < 40
        )
        ours = data.NormalizeAndResize(size, CPU)(images)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


# ---- from end to end ----------------------------------------------------------------------------


def test_two_classes_are_trained_evaluated_and_compared(photos, tmp_path):
    flags = [*TINY, "--dataset", "photos", *SIZE, "--holdout-per-class", "0"]
    script = run_script("train.py", *flags, "--epochs", "1", "--mixup", "0.4", cwd=tmp_path)
    assert script.status == 0, script.stderr
    assert "photos: 8 training and 12 validation images, 2 classes" in script.stdout
    assert "best.pt is selected on photos/val; --holdout-per-class" in script.stdout
    script = run_script(
        "train.py", *flags, "--epochs", "2", "--mixup", "0.4", "--resume", cwd=tmp_path
    )
    assert script.status == 0, script.stderr

    shutil.move(photos, tmp_path / "moved")
    flags = ["--checkpoint", "checkpoints/demo/best.pt", "--no-show", "--tta"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path)
    assert script.status == 1 and script.stderr.startswith("photos/val: No such file or directory")
    flags += ["--dataset", "moved"]
    script = run_script("evaluate.py", *flags, "--results-dir", "before", cwd=tmp_path)
    assert script.status == 0, script.stderr
    assert "top-1" in script.stdout and "top-5" not in script.stdout
    script = run_script("evaluate.py", *flags, "--compare", "before", cwd=tmp_path)
    assert script.status == 0, script.stderr
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())
    assert metrics["images"] == 12 and metrics["dataset"].startswith("12 pictures, crc32 ")
    assert metrics["test_images_chose_checkpoint"] and metrics["comparison"]["difference"] == 0
    assert {"mistakes.png", "confusion_matrix.png"} <= {
        path.name for path in (tmp_path / "results").iterdir()
    }
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    (tmp_path / "other/val/one/00000.png").unlink()
    shutil.copy(tmp_path / "moved/val/one/00001.png", tmp_path / "other/val/one/00000.png")
    compare = [*flags[:-1], "other", "--compare", "before"]
    script = run_script("evaluate.py", *compare, cwd=tmp_path)
    assert script.status == 1 and "its data set is '12 pictures, crc32" in script.stderr
    script = run_script("evaluate.py", *compare[:-2], "--results-dir", "r", cwd=tmp_path)
    assert "these are not the images that selected the checkpoint" in script.stdout
    script = run_script("evaluate.py", *flags, "--images", "moved/val", cwd=tmp_path)
    assert script.status == 0, script.stderr
    rows = (tmp_path / "results/pictures.csv").read_text().splitlines()
    assert rows[0] == "file,class_1,probability_1,class_2,probability_2" and len(rows) == 13
    # Reduced to the stored size, they are what was evaluated: the same confidence, without --tta.
    script = run_script("evaluate.py", *flags[:3], *flags[-2:], "--results-dir", "r", cwd=tmp_path)
    with open(tmp_path / "r/predictions.csv") as file:
        evaluated = {Path(row["file"]).name + row["label"]: row for row in csv.DictReader(file)}
    script = run_script(
        "evaluate.py", *flags[:3], "--images", "moved/val", "--results-dir", "r", cwd=tmp_path
    )
    with open(tmp_path / "r/pictures.csv") as file:
        for row in csv.DictReader(file):
            path = Path(row["file"])
            label = "01"[path.parent.name == "zero"]
            confidence = float(evaluated[path.name + label]["confidence"])
            assert float(row["probability_1"]) == pytest.approx(confidence, abs=1e-5)


def test_folder_without_val_is_evaluated_on_its_hold_out(photos, tmp_path):
    shutil.rmtree(photos / "val")
    flags = [*TINY, "--dataset", "photos", *SIZE, "--holdout-per-class", "3", "--epochs", "1"]
    script = run_script("train.py", *flags, cwd=tmp_path)
    assert script.status == 0, script.stderr
    assert "8 training and 6 validation images" in script.stdout
    flags = ["--checkpoint", "checkpoints/demo/best.pt", "--no-show"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path)
    assert script.status == 0, script.stderr
    assert "photos: 6 hold-out images, because there is no val/" in script.stdout
    assert "the checkpoint was selected on these images" in script.stdout
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())
    assert metrics["test_images_chose_checkpoint"] is True
    assert metrics["loss"] == pytest.approx(metrics["history"][-1]["val_loss"], rel=1e-5)


def test_run_goes_on_with_its_own_pictures_alone_wherever_they_are(photos, tmp_path):
    shutil.rmtree(photos / "val")
    flags = [*TINY, *SIZE, "--holdout-per-class", "3"]
    script = run_script("train.py", *flags, "--dataset", "photos", "--epochs", "1", cwd=tmp_path)
    assert script.status == 0, script.stderr
    shutil.move(photos, tmp_path / "moved")
    flags += ["--dataset", "moved", "--epochs", "2", "--resume"]
    script = run_script("train.py", *flags, cwd=tmp_path)
    assert script.status == 0 and "epoch    2/2" in script.stdout, script.stderr
    assert script.stdout.endswith("best.pt --dataset moved\n")

    one, *others = sorted((tmp_path / "moved/train/one").iterdir())
    for other in others:
        shutil.copy(one, other)  # as many pictures as before
    script = run_script("train.py", *flags, cwd=tmp_path)
    assert script.status == 1 and "it was trained on other images: 8 pictures" in script.stderr
    flags = ["--checkpoint", "checkpoints/demo/best.pt", "--no-show", "--dataset"]
    for other in ("moved", "digits"):
        script = run_script("evaluate.py", *flags, other, cwd=tmp_path)
        assert script.status == 1 and script.stderr.count("\n") == 1
        assert f"{other} is not what checkpoints/demo/best.pt was trained on: 8" in script.stderr


def test_resume_refuses_a_changed_val_folder(photos, tmp_path):
    flags = [*TINY, "--dataset", "photos", *SIZE, "--holdout-per-class", "0", "--epochs", "1"]
    assert run_script("train.py", *flags, cwd=tmp_path).status == 0
    (photos / "val" / "one" / "new.png").write_bytes(next(photos.rglob("*.png")).read_bytes())
    script = run_script("train.py", *flags, "--resume", cwd=tmp_path)
    assert script.status == 1 and script.stderr.count("\n") == 1
    assert "it was validated on other images: 12 pictures" in script.stderr


# ---- what is refused ----------------------------------------------------------------------------


def load_splits(folder: Path, **changed):
    place = {"dataset": str(folder), "data_dir": str(folder.parent / "data"), "stored_size": 32}
    return data.read_splits(settings(**place | changed))


def test_classes_of_val_keep_the_numbers_that_train_gave_them(photos):
    shutil.rmtree(photos / "val" / "one")
    _, val_split, data_facts = load_splits(photos)
    assert data_facts["classes"] == ["one", "zero"] and val_split.labels.tolist() == [1] * 6


def remove(*names: str):
    return lambda photos: [shutil.rmtree(photos / name) for name in names]


def empty(name: str):
    return lambda photos: [path.write_bytes(b"") for path in (photos / name).iterdir()]


@pytest.mark.parametrize(
    ("spoil", "changed", "message"),
    [
        (remove("train"), {}, r"photos/train: No such file or directory\nExpected one sub-folder"),
        (remove("train", "val"), {}, r"photos/val not found. Expected cifar100, digits, or a folder"),
        (remove("val"), {}, r"photos/val not found. .*without val/, --holdout-per-class 50"),
        (remove("train/one", "train/zero"), {}, r"photos/train: no sub-folders"),
        (remove("train/one"), {}, r"photos/train has 1 class, zero. Expected at least 2"),
        (lambda photos: (photos / "train/none").mkdir(), {}, "train/none has no picture"),
        (empty("train/one"), {}, "train/one has no picture that can be decoded"),
        (empty("val/zero"), {}, "val/zero has no picture that can be decoded"),
        (lambda photos: (photos / "val/none").mkdir(), {}, "val/none is not one of the 2 classes"),
        (remove("val/one", "val/zero"), {}, "photos/val: no sub-folders"),
        (lambda photos: (photos / "val/one").rename(photos / "val/two"), {},
         "val/two is not one of the 2 classes"),
        (remove(), {"holdout_per_class": 12}, "Class one has 12 .* --holdout-per-class 12"),
    ],
)  # fmt: skip
def test_folder_that_cannot_be_used_is_one_message(spoil, changed, message, photos):
    spoil(photos)
    with pytest.raises(SystemExit, match=message) as error:
        load_splits(photos, **changed)
    assert str(error.value).count("\n") <= 1


def test_weights_that_are_not_there_are_refused_before_anything_is_decoded(photos, monkeypatch):
    monkeypatch.setattr(data, "read_splits", lambda *args: pytest.fail("decoded"))
    monkeypatch.chdir(photos.parent)
    with pytest.raises(SystemExit, match="Weights none.pth not found. Expected IMAGENET1K_V1, "):
        train.main(["--dataset", "photos", *SIZE, "--weights", "none.pth"])


def test_images_stay_in_memory_if_half_of_the_device_would_be_full(monkeypatch):
    images, gpu = torch.zeros(10, 3, 2, 2, dtype=torch.uint8), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (239, 1000))
    assert data.place(images, gpu) is images and data.place(images, CPU) is images
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (240, 1000))
    with pytest.raises((RuntimeError, AssertionError)):  # there is no GPU to move them to
        data.place(images, gpu)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "."], "--stored-size 0: expected .* for example 224"),
        (["--dataset", "cifar10"], "--dataset 'cifar10': expected cifar100, digits, or a folder "),
        (["--stored-size", "64"], "--stored-size 64: expected 0 with cifar100"),
        (["--dataset", ""], '--dataset \'\': expected "cifar100", "digits", or a folder'),
    ],
)
def test_stored_size_belongs_to_a_folder(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(flags)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
