"""A folder of pictures in place of CIFAR-100: how it is read, trained on, evaluated and refused."""

import os
import shutil
import subprocess
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import TINY, read_json, read_rows, settings
from torchvision.transforms.v2 import functional

import data
import evaluate
import train

CPU = torch.device("cpu")


def write_pictures(folder: Path, split: data.Split, names: list[str]) -> Path:
    """Writes each image as a PNG into the sub-folder of its class; file names sort as images do."""
    for index, (image, label) in enumerate(zip(split.images, split.labels)):
        path = folder / names[label] / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        functional.to_pil_image(image).save(path)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for part, source, count in (("train", "train", 12), ("val", "test", 6)):
        split, _ = data.read_digits(source)
        for label, name in enumerate(["zero", "one"]):
            chosen = split.select(split.labels == label).select(slice(count))
            write_pictures(folder / part, chosen, [name] * 2)
    return folder


@pytest.fixture
def photos(digits, tmp_path, monkeypatch) -> Path:
    """Zeros and ones in the working folder: 12 to train on, 6 in val/, per class."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(digits, tmp_path / "photos")


def read(folder: Path, size: int = 32, **changed) -> tuple[data.Split, list[str]]:
    listing, classes = data.list_pictures(folder)
    place = settings(stored_size=size, data_dir=str(folder.parent / "decoded"), **changed)
    return data.load(listing, "val", place), classes


def read_splits(folder: Path, **changed) -> tuple[data.Split, data.Split, dict]:
    return data.read_splits(settings(dataset=str(folder), **{"stored_size": 32} | changed))


# ---- reading ------------------------------------------------------------------------------------


def test_cifar100_as_a_folder_of_pictures_gives_the_same_tensors(cifar100_dir, tmp_path):
    test, classes = data.read_cifar100(cifar100_dir, "test")
    chosen = test.select(test.labels < 10).select(slice(200))
    split, names = read(write_pictures(tmp_path / "val", chosen, classes))
    order = chosen.labels.argsort(stable=True)
    assert names == classes[:10] and len(split.labels) == 200
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
    modes = "L.png RGBA.png P.png 1.png LA.png CMYK.jpg RGB.webp YCbCr.tif"
    for name in modes.split():
        gray.convert(name.split(".")[0]).save(tmp_path / "a" / name)
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
    dark, bright = split.images[..., :9].float(), split.images[..., 15:].float()
    dithered = np.array([file.endswith("/1.png") for file in split.files])  # its means count
    assert (dark[~dithered] - 50).abs().max() < 12 and (bright[~dithered] - 200).abs().max() < 12
    assert dark[dithered].mean() < 100 < bright[dithered].mean()
    skipped = sorted(capsys.readouterr().err.splitlines())
    expected = [f"skipped  {tmp_path / 'b' / name}" for name in ("corrupt.jpg", "empty.png")]
    assert [line.split(": ")[0] for line in skipped] == [f"ignored  {tmp_path}", *expected]


def test_folders_that_people_have_are_read_as_they_expect(tmp_path, capsys):
    """Seven pictures of a and one of b; the rest is hidden, linked twice, or no picture."""
    picture = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    for name in ("a/.ipynb_checkpoints", "a/ä ö", "b/@eaDir", ".thumbnails", "__MACOSX"):
        (tmp_path / name).mkdir(parents=True)
    kinds = dict.fromkeys(["a/2.JFIF", "a/photo.jpg_large"], "JPEG")
    kinds |= {"a/lies.png": "GIF", "a/nothing": "PNG"}
    names = [*kinds, "a/1.gif", "a/ä ö/3.Png", "a/new\nline.webp", "b/4.jpg"]
    hidden = ["a/.ipynb_checkpoints/1.png", "b/@eaDir/4.jpg", "b/._4.png", ".thumbnails/4.png"]
    for name in names + hidden:
        picture.save(tmp_path / name, format=kinds.get(name))
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
    ("dtype", "values", "top"),
    [
        ("uint16", [0, 1000, 4095], 4095),  # 12 bits
        ("uint16", [0, 500, 40000], 65535),
        ("int32", [0, 128, 255], 255),
        ("int32", [0, 2**30, 2**31 - 1], 2**32 - 1),
        ("float32", [0, 0.5, 1], 1),
        ("float32", [np.nan, 100.5, 250], 255),
    ],
)
def test_values_of_many_bits_keep_their_range(dtype, values, top, tmp_path):
    Image.fromarray(np.array([values] * 3, dtype)).save(tmp_path / "a.tif")
    gray = data.read_picture(tmp_path / "a.tif", 3)[0, 1]
    assert gray.numpy() == pytest.approx(np.nan_to_num(values) * 255 / top, abs=0.5)


def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = [255, 0, 0, 255]  # the second row is black and transparent
    Image.fromarray(pixels).save(tmp_path / "a.png")
    red, white = data.read_picture(tmp_path / "a.png", 2)[:, :, 0].T.tolist()
    assert (red, white) == ([255, 0, 0], [255, 255, 255])


def test_whole_pictures_are_padded_to_squares(photos):
    pixels = np.full((8, 16, 3), 200, np.uint8)
    pixels[:, :4] = 50  # what the centre square leaves out
    for path in (photos / "train").rglob("*.png"):
        Image.fromarray(pixels).save(path)
    splits = [read(photos / "train", 16, whole_pictures=x)[0] for x in (False, True)]
    centre, whole = (split.images[0] for split in splits)
    assert centre[:, :, 3:].min() > 195  # bicubic interpolation looks two pixels beyond
    assert whole[:, [0, 3, 12, 15]].max() == 0  # black above and below
    assert whole[0, 8, [0, 15]].tolist() == [50, 200]


def test_pictures_are_decoded_once_until_one_changes(photos, capsys):
    """Also after a copy to another place, after damage, and for every part and size once."""

    def count(**changed) -> int:
        with patch.object(data, "read_picture", wraps=data.read_picture) as read_picture:
            splits = read_splits(photos, **changed)[:2]
        for split in splits:
            for name, image in zip(split.files, split.images, strict=True):
                assert data.read_picture(photos / name, image.shape[-1]).equal(image)
        return len(read_picture.call_args_list)

    assert count() == 36 and count() == 0
    assert count(stored_size=24) == 36 and count() == 0
    assert count(train_per_class=2) == 4 and count(holdout_per_class=2, train_per_class=3) == 10
    folder = Path("data/decoded")
    files = sorted(folder.iterdir())
    assert len(files) == 2 * 7 and {path.suffix for path in files} == {".bin", ".json"}

    os.utime(photos / "train/one/00000.png")  # another time
    assert count() == 24 and sorted(folder.iterdir()) != files
    assert len(list(folder.iterdir())) == 2 * 7  # the outdated file is gone
    shutil.copy(photos / "val/one/00000.png", photos / "val/one/new.png")
    assert count() == 13
    path = max(folder.glob("photos-val-32px*.bin"), key=lambda path: path.stat().st_size)
    decoded = path.read_bytes()
    for damage in (decoded[:1000] + b"other" + decoded[1005:], decoded[:1000]):
        path.write_bytes(damage)
        assert count() == 13
    path.with_suffix(".json").write_text("{")
    assert count() == 13
    assert f"decoded  {path}: 13 pictures, 0.0 MB" in capsys.readouterr().out


def test_decoding_that_fails_leaves_nothing(photos):
    full = patch.object(os, "posix_fallocate", side_effect=OSError(28, "full"))
    with full, pytest.raises(data.DataError, match="data/decoded: full. See --data-dir"):
        read_splits(photos)
    assert list(Path("data/decoded").iterdir()) == []


def test_memory_that_runs_out_does_not_skip_pictures(photos):
    with patch.object(data, "read_picture", side_effect=MemoryError), pytest.raises(MemoryError):
        read_splits(photos)


def test_class_without_pictures_in_val_is_not_validated_and_keeps_its_number(photos):
    shutil.rmtree(photos / "val/one")
    for _ in ("no folder", "an empty one"):
        _, val_split, facts = read_splits(photos)
        assert facts["classes"] == ["one", "zero"] and val_split.labels.tolist() == [1] * 6
        (photos / "val/one").mkdir(exist_ok=True)


def test_large_jpeg_is_decoded_at_a_reduced_scale_and_looks_the_same(tmp_path):
    digit = data.read_digits("test")[0].images[0]
    large = functional.to_pil_image(functional.resize(digit, [600, 800]))
    large.save(tmp_path / "large.png")
    large.save(tmp_path / "large.jpg", quality=95)
    convert = Image.Image.convert
    with patch.object(Image.Image, "convert", autospec=True, side_effect=convert) as converted:
        reduced = data.read_picture(tmp_path / "large.jpg", 32)
    assert (100, 75) in [call.args[0].size for call in converted.call_args_list]
    full = data.read_picture(tmp_path / "large.png", 32)
    assert (reduced.float() - full.float()).abs().mean() < 2


def test_resizing_has_antialiasing_only_where_it_shrinks():
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    normalized = functional.normalize(images, data.IMAGENET_MEAN, data.IMAGENET_STD)
    for size in (32, 40, 96):
        expected = functional.resize(normalized, [size, size], antialias=size < 40)
        ours = data.NormalizeAndResize(size, CPU)(images)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_images_stay_in_memory_if_half_of_the_device_would_be_full(monkeypatch):
    images, gpu = torch.zeros(10, 3, 2, 2, dtype=torch.uint8), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (239, 1000))
    assert data.place(images, gpu) is images and data.place(images, CPU) is images
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (240, 1000))
    with pytest.raises((RuntimeError, AssertionError)):  # there is no GPU to move them to
        data.place(images, gpu)


# ---- from end to end ----------------------------------------------------------------------------

TRAIN = [*TINY, "--stored-size", "40", "--epochs"]
EVALUATE = ["--checkpoint", "checkpoints/demo/best.pt", "--no-show"]


def assert_refused(script, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        script.main(flags)
    assert str(error.value).count("\n") <= 1


def test_two_classes_are_trained_evaluated_and_compared(photos, capsys):
    flags = ["--dataset", "photos", "--holdout-per-class", "0", "--mixup", "0.4"]
    train.main([*TRAIN, "1", *flags])
    said = capsys.readouterr().out
    assert "photos: 8 training and 12 validation images, 2 classes" in said
    assert "best.pt is selected on photos/val; --holdout-per-class" in said
    train.main([*TRAIN, "2", *flags, "--resume"])

    photos.rename("moved")
    flags = [*EVALUATE, "--tta"]
    assert_refused(evaluate, flags, "^photos/val: No such file or directory")
    evaluate.main([*flags, "--dataset", "moved", "--results-dir", "before"])
    said = capsys.readouterr().out
    assert "top-1" in said and "top-5" not in said
    evaluate.main([*flags, "--dataset", "moved", "--compare", "before"])
    metrics = read_json("results/metrics.json")
    assert metrics["images"] == 12 and metrics["dataset"].startswith("12 pictures, crc32 ")
    assert metrics["test_images_chose_checkpoint"] and metrics["comparison"]["difference"] == 0
    assert Path("results/mistakes.png").exists() and Path("results/confusion_matrix.png").exists()

    # Pictures of any size that are named by hand are reduced to the same, and predicted the same.
    evaluate.main([*flags, "--images", "moved/val"])
    evaluated, named = read_rows("results/predictions.csv"), read_rows("results/pictures.csv")
    assert [*named[0]] == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row["file"] for row in named] == [f"moved/{row['file']}" for row in evaluated]
    for row, like in zip(named, evaluated):
        assert float(row["probability_1"]) == pytest.approx(float(like["confidence"]), abs=1e-5)

    one, other, *_ = Path("moved/val/one").iterdir()
    shutil.copy(one, other)  # as many pictures as before
    capsys.readouterr()
    flags = [*flags, "--dataset", "moved", "--compare", "before"]
    assert_refused(evaluate, flags, "its data set is '12 pictures, crc32")
    assert "these are not the images that selected the checkpoint" in capsys.readouterr().out
    flags = ["--dataset", "moved", "--holdout-per-class", "0", "--mixup", "0.4", "--resume"]
    assert_refused(train, [*TRAIN, "3", *flags], "it was validated on other images: 12 pictures")


def test_run_without_val_goes_on_and_is_evaluated_with_its_own_hold_out_alone(photos, capsys):
    shutil.rmtree(photos / "val")
    flags = ["--holdout-per-class", "3", "--dataset"]
    train.main([*TRAIN, "1", *flags, "photos"])
    assert "8 training and 6 validation images" in capsys.readouterr().out
    evaluate.main(EVALUATE)
    said = capsys.readouterr().out
    assert "photos: 6 hold-out images, because there is no val/" in said
    assert "the checkpoint was selected on these images" in said
    metrics = read_json("results/metrics.json")
    assert metrics["test_images_chose_checkpoint"] is True
    assert metrics["loss"] == pytest.approx(metrics["history"][-1]["val_loss"], rel=1e-5)

    photos.rename("moved")
    flags += ["moved", "--resume"]
    train.main([*TRAIN, "2", *flags])
    said = capsys.readouterr().out
    assert "epoch    2/2" in said and said.endswith("best.pt --dataset moved\n")
    one, *others = Path("moved/train/one").iterdir()
    for other in others:
        shutil.copy(one, other)  # as many pictures as before
    assert_refused(train, [*TRAIN, "3", *flags], "it was trained on other images: 8 pictures")
    for other in ("moved", "digits"):
        message = f"{other} is not what checkpoints/demo/best.pt was trained on: 8"
        assert_refused(evaluate, [*EVALUATE, "--dataset", other], message)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("rm -r train", r"photos/train: No such file or directory\nExpected one sub-folder"),
        ("rm -r train val", "photos/val not found. Expected cifar100, digits, or a folder"),
        ("rm -r val", "photos/val not found. .*without val/, --holdout-per-class 50"),
        ("rm -r train/*", "photos/train: no sub-folders"),
        ("rm -r train/one", "photos/train has 1 class, zero. Expected at least 2"),
        ("mkdir train/none", "train/none has no picture"),
        ("truncate -s 0 train/one/*", "train/one has no picture that can be decoded"),
        ("truncate -s 0 val/zero/*", "val/zero has no picture that can be decoded"),
        ("mkdir val/none", "val/none is not one of the 2 classes"),
        ("rm -r val/*", "photos/val: no sub-folders"),
        ("rm -r val/*/*", "photos/val has no picture"),
        ("mv val/one val/two", "val/two is not one of the 2 classes"),
    ],
)
def test_folder_that_cannot_be_used_is_one_message(spoil, message, photos):
    subprocess.run(spoil, shell=True, check=True, cwd=photos)
    with pytest.raises(SystemExit, match=message) as error:
        read_splits(photos)
    assert str(error.value).count("\n") <= 1


def test_class_that_would_be_held_out_whole_is_refused(photos):
    with pytest.raises(SystemExit, match="Class one has 12 .* --holdout-per-class 12"):
        read_splits(photos, holdout_per_class=12)


def test_weights_that_are_not_there_are_refused_before_anything_is_decoded(photos):
    flags = ["--dataset", "photos", "--stored-size", "40", "--weights", "none.pth"]
    assert_refused(train, flags, "Weights none.pth not found. Expected IMAGENET1K_V1, ")
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset .", "--stored-size 0: expected a number of pixels per side"),
        ("--dataset cifar10", "--dataset 'cifar10': expected cifar100, digits, or a folder "),
        ("--stored-size 64", "--stored-size 64: expected 0 with cifar100"),
        ("--dataset=", """--dataset '': expected "cifar100", "digits", or a folder"""),
    ],
)
def test_stored_size_belongs_to_a_folder(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(flags.split())
    assert end.value.code == 2 and message in capsys.readouterr().err
