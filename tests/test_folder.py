"""A folder of pictures in place of CIFAR-100: how it is read, trained on, evaluated and refused."""

import json
import os
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scripts import TINY, read_json, read_rows, settings, without_bars
from torchvision.transforms.v2 import functional

import data
import evaluate
import train
import utils

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
    place = settings(stored_size=size, data_dir=str(folder.parent / "decoded"), **changed)
    split, classes = data.read_folder(folder, place)
    return data.leave_out_undecoded(split, place), classes


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
    skipped = sorted(without_bars(capsys.readouterr().err))
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
    (line,) = without_bars(capsys.readouterr().err)
    assert line.startswith(f"ignored  {tmp_path}: files that Pillow cannot read: ")
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


def test_whole_pictures_of_which_no_pixel_would_be_left_are_refused(tmp_path):
    for width, refused in ((93, False), (96, True)):  # of 3: half a pixel of 16, rounded
        Image.new("RGB", (width, 3), "red").save(tmp_path / "narrow.png")
        assert data.read_picture(tmp_path / "narrow.png", 16).max() == 255
        if refused:
            with pytest.raises(ValueError, match=f"{width} x 3 pixels are too narrow for 16 x 16"):
                data.read_picture(tmp_path / "narrow.png", 16, whole=True)
        else:
            assert data.read_picture(tmp_path / "narrow.png", 16, whole=True).max() == 255


def test_pictures_are_decoded_once_until_one_changes(photos, capsys):
    """Also after damage; once for every part and size, whatever is selected of them."""

    def count(**changed) -> int:
        with patch.object(data, "read_picture", wraps=data.read_picture) as read_picture:
            splits = read_splits(photos, **changed)[:2]
        for split in splits:
            for name, image in zip(split.files, split.images, strict=True):
                assert data.read_picture(photos / name, image.shape[-1]).equal(image)
        return len(read_picture.call_args_list)

    assert count() == 36 and count() == 0
    assert count(stored_size=24) == 36 and count() == 0
    assert count(train_per_class=2) == count(holdout_per_class=2, train_per_class=3) == 0
    folder = Path("data/decoded")
    files = sorted(folder.glob("[!.]*"))
    assert len(files) == 2 * 4 and {path.suffix for path in files} == {".bin", ".json"}

    os.utime(photos / "train/one/00000.png")  # another time
    assert count() == 24 and sorted(folder.glob("[!.]*")) != files
    assert len(list(folder.glob("[!.]*"))) == 2 * 4  # the outdated file is gone
    shutil.copy(photos / "val/one/00000.png", photos / "val/one/new.png")
    assert count() == 13
    path = max(folder.glob("photos-val-32px*.bin"), key=lambda path: path.stat().st_size)
    decoded = path.read_bytes()
    for damage in (decoded[:1000] + b"other" + decoded[1005:], decoded[:1000]):
        path.write_bytes(damage)
        assert count() == 13
    about = path.with_suffix(".json")
    written = json.loads(about.read_text())
    written["checksums"][3] += 1
    for text in (json.dumps(written), "{", "[]", "{}", "7", '{"hash": 0}'):
        about.write_text(text)
        assert count() == 13, text
    assert f"decoded  {path}: 13 pictures, 0.0 MB" in capsys.readouterr().out
    assert count() == 0
    assert f"found    {path}: 13 pictures, 0.0 MB" in capsys.readouterr().out


def test_a_selection_copies_and_decodes_nothing(photos):
    """Images lie in the decoded file of their part, whatever is chosen of them."""
    for changed in ({}, {"train_per_class": 3}, {"holdout_per_class": 2}):
        for split in read_splits(photos, **changed)[:2]:
            assert len(split.stored) == {"train": 24, "val": 12}[split.files[0].split("/")[0]]
            place = split.stored.data_ptr() + 3 * 32 * 32 * split.rows[1].item()
            assert split.image(1).data_ptr() == place


def test_decoded_pictures_are_not_read_to_start(photos, monkeypatch):
    """Neither to identify them nor to find copies, unless two have one checksum."""
    facts = read_splits(photos)[2]
    path = next(Path("data/decoded").glob("photos-train-32px*.bin"))
    times = path.stat()
    path.write_bytes(bytes(times.st_size))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    train_split, val_split, same_facts = read_splits(photos)
    assert not train_split.images.any() and same_facts == facts
    assert data.find_identical(train_split, val_split) == []


def test_pictures_have_the_identity_that_earlier_versions_gave_them(photos):
    """The crc32 of all pixels after that of the labels, as stored in checkpoints and results."""
    (photos / "train/one/00003.png").write_bytes(b"no picture")
    for changed in ({}, {"train_per_class": 5}, {"holdout_per_class": 3}):
        *splits, facts = read_splits(photos, **changed)
        for split, name in zip(splits, ("dataset", "validation")):
            checksum = zlib.crc32(split.labels.numpy())
            for file in split.files:
                checksum = zlib.crc32(
                    data.read_picture(photos / file, 32).contiguous().numpy(), checksum
                )
            assert facts[name] == f"{len(split.files)} pictures, crc32 {checksum:08x}"


def test_picture_that_cannot_be_decoded_does_not_change_what_is_held_out(photos):
    held_out = read_splits(photos, holdout_per_class=3)[1].files
    (photos / held_out[0]).write_bytes(b"no picture")
    assert read_splits(photos, holdout_per_class=3)[1].files == held_out[1:]


def test_what_a_killed_process_left_is_removed_and_a_running_one_waited_for(photos, capsys):
    folder, other = Path("data/decoded"), Path("data/.download-left")
    for left in (folder / ".decoding-left", other):
        left.mkdir(parents=True)
        (left / "large.bin").write_bytes(bytes(1000))
    with data.scratch_folder(folder, "decoding") as running:
        wait = """
import data, sys
from pathlib import Path
with data.scratch_folder(Path("data/decoded"), "decoding"):
    assert not Path(sys.argv[1]).exists()
"""
        command = [sys.executable, "-c", wait, str(running)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert "waiting  another process is writing into data/dec" in process.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert running.exists()
    assert process.wait() == 0
    read_splits(photos)
    assert {path.suffix for path in folder.glob("[!.]*")} == {".bin", ".json"} and other.exists()
    with data.scratch_folder(Path("data"), "download"):
        assert not other.exists()


def test_nothing_is_renamed_or_removed_while_it_is_mapped(photos, monkeypatch):
    """As Windows forbids."""

    def is_mapped(path: Path) -> bool:
        return path.name in Path("/proc/self/maps").read_text()

    def replace(self, target, real=Path.replace):
        assert not is_mapped(self)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    splits = read_splits(photos)
    assert is_mapped(next(Path("data/decoded").glob("photos-val*.bin"))) and splits


def test_decoding_needs_no_semaphores(photos):
    """Without /dev/shm, multiprocessing cannot make any."""
    no_semaphores = patch("_multiprocessing.SemLock", side_effect=FileNotFoundError(2, "shm"))
    with no_semaphores:
        assert len(read_splits(photos)[0].labels) == 24


def test_outdated_file_that_cannot_be_removed_does_not_end_a_run(photos):
    read_splits(photos)
    os.utime(photos / "train/one/00000.png")
    with patch.object(Path, "unlink", side_effect=PermissionError(1, "another user's")):
        assert len(read_splits(photos)[0].labels) == 24


def test_decoding_that_fails_leaves_nothing(photos):
    full = patch.object(os, "posix_fallocate", side_effect=OSError(28, "full"))
    with full, pytest.raises(utils.UserError, match="data/decoded: full. See --data-dir"):
        read_splits(photos)
    assert os.listdir("data/decoded") == [".decoding.lock"]


def test_memory_that_runs_out_does_not_skip_pictures(photos):
    with patch.object(data, "read_picture", side_effect=MemoryError), pytest.raises(MemoryError):
        read_splits(photos)


def test_class_without_pictures_in_val_is_not_validated_and_keeps_its_number(photos):
    shutil.rmtree(photos / "val/one")
    for _ in ("no folder", "an empty one"):
        _, val_split, facts = read_splits(photos)
        assert facts["classes"] == ["one", "zero"] and val_split.labels.tolist() == [1] * 6
        (photos / "val/one").mkdir(exist_ok=True)


def test_names_that_differ_in_how_accents_are_stored_are_one_class(photos):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (photos / "train/one").rename(photos / "train" / composed)
    (photos / "val/one").rename(photos / "val" / decomposed)
    _, val_split, facts = read_splits(photos)
    assert facts["classes"] == [composed, "zero"]
    assert val_split.labels.bincount().tolist() == [6, 6]
    (photos / "train/zero").rename(photos / "train" / decomposed)
    with pytest.raises(utils.UserError, match="Class cafe\u0301 has 0 training images"):
        read_splits(photos)


def test_picture_is_upright_whatever_else_its_exif_data_holds(tmp_path):
    """As every orientation would have it, also beside a field of a wrong type."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    upright = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.save(tmp_path / "plain.jpg", exif=exif, quality=95)
        with Image.open(tmp_path / "plain.jpg") as image:
            expected = ImageOps.exif_transpose(image).resize((24, 24), Image.Resampling.BICUBIC)
        exif[0x011A] = 72.0  # resolution, a fraction
        block = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")  # now a text
        assert block != exif.tobytes()
        upright.save(tmp_path / "wrong.jpg", exif=block, quality=95)
        ours = [data.read_picture(tmp_path / f"{name}.jpg", 24) for name in ("plain", "wrong")]
        assert torch.equal(*ours)
        assert torch.equal(ours[0], functional.pil_to_tensor(expected))
    upright.save(tmp_path / "none.jpg", exif=b"Exif\x00\x00no such data")
    assert data.read_picture(tmp_path / "none.jpg", 24).shape == (3, 24, 24)


def test_huge_jpeg_is_read_and_another_huge_picture_is_named(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    huge = Image.new("1", (16_400, 12_300))
    huge.convert("L").save(tmp_path / "photos/a/200.jpg")
    huge.save(tmp_path / "photos/a/200.png")
    huge.crop((0, 0, 12_000, 9_000)).save(tmp_path / "photos/b/108.png")
    del huge
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split, _ = read(tmp_path / "photos")
    assert split.files == ["photos/a/200.jpg", "photos/b/108.png"]
    reason = "16,400 x 12,300 pixels are more than 178,956,970. Make it smaller"
    said = without_bars(capsys.readouterr().err)
    assert said == [f"skipped  {tmp_path}/photos/a/200.png: {reason}"]


def test_heic_pictures_are_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 200
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.HEIC")
    split, _ = read(tmp_path)
    assert split.images[..., 20:].min() > 180 and split.images[..., :12].max() < 20


def test_heic_pictures_are_named_where_it_is_not_installed(tmp_path, capsys):
    if ".heic" in Image.registered_extensions():
        pytest.skip("pillow-heif is installed")
    for path in ("a/1.HEIC", "a/2.HEIC", "a/notes.txt", "b/1.heic"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    counts = (
        "a has no picture: files that Pillow cannot read: 2 .HEIC, 1 .txt. With the package pill"
    )
    with pytest.raises(utils.UserError, match=counts):
        read(tmp_path)
    with pytest.raises(utils.UserError, match="No picture among"):
        next(data.read_pictures([str(tmp_path / "a"), str(tmp_path / "b/1.heic")], 32, False, 4))
    said = capsys.readouterr().err.splitlines()
    advised = [line.split()[1] for line in said if "With the package pillow-heif" in line]
    assert advised == [f"{tmp_path}/{name}" for name in ("a/1.HEIC:", "a/2.HEIC:", "b/1.heic:")]


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


def test_images_fit_a_gpu_if_they_fill_half_of_what_is_free(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (239, 1000))
    assert not data.fits(120, gpu) and data.fits(120, CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (240, 1000))
    assert data.fits(120, gpu)


# ---- from end to end ----------------------------------------------------------------------------

TRAIN = [*TINY, "--stored-size", "40", "--epochs"]
EVALUATE = ["--checkpoint", "checkpoints/demo/best.pt"]


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
    assert_refused(evaluate, flags, "^photos/val not found. If its parent .*see --dataset")
    evaluate.main([*flags, "--dataset", "moved", "--results-dir", "before"])
    said = capsys.readouterr().out
    assert "top-1" in said and "top-5" not in said
    evaluate.main([*flags, "--dataset", "moved", "--compare", "before"])
    metrics = read_json("results/metrics.json")
    assert metrics["images"] == 12 and metrics["dataset"].startswith("12 pictures, crc32 ")
    assert metrics["test_images_chose_checkpoint"] and metrics["comparison"]["difference"] == 0
    assert Path("results/report.html").exists() and Path("results/confusion_matrix.png").exists()

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


def test_test_images_of_a_folder_are_for_evaluate_alone(photos, capsys):
    shutil.copytree(photos / "val", photos / "test")
    for path in (photos / "test/one").iterdir():
        path.unlink()
    train.main([*TRAIN, "1", "--dataset", "photos", "--holdout-per-class", "0"])
    said = capsys.readouterr().out
    assert "best.pt is selected on photos/val; evaluate.py measures on photos/test" in said
    evaluate.main(EVALUATE)
    said = capsys.readouterr().out
    assert "photos: 6 images of photos/test" in said
    assert "were used neither to train nor to select the checkpoint" in said
    assert {row["file"].split("/")[0] for row in read_rows("results/predictions.csv")} == {"test"}
    assert read_json("results/metrics.json")["test_images_chose_checkpoint"] is False

    for path in (photos / "val/one").iterdir():
        shutil.copy(path, photos / "test/one")
    evaluate.main(EVALUATE)  # those of val/ by another name
    assert "the checkpoint was selected on these images" in capsys.readouterr().out
    shutil.rmtree(photos / "test/one")
    (photos / "test/zero").rename(photos / "test/unsorted")
    assert_refused(evaluate, EVALUATE, "'unsorted' is not one of the 2 classes trained on. Remove")
    for path in (photos / "test/unsorted").iterdir():
        path.rename(photos / "test" / path.name)
    (photos / "test/unsorted").rmdir()  # pictures without labels, as competitions have them
    evaluate.main(EVALUATE)
    assert "photos: 12 images of photos/val" in capsys.readouterr().out


def test_folder_called_as_a_built_in_data_set_is_told_how_to_use_it(photos, capsys):
    photos.rename("digits")
    train.main([*TINY, "--epochs", "1"])
    note = "--dataset digits is the built-in data set; the folder digits/ is --dataset ./digits"
    assert note in capsys.readouterr().out
    train.main([*TRAIN, "1", "--dataset", "./digits"])
    assert "./digits: 8 training and 4 validation images, 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "val"])
def test_part_that_is_named_in_place_of_its_folder_is_one_message(name, photos, monkeypatch):
    with pytest.raises(utils.UserError, match="train not found. Its parent .*: --dataset photos$"):
        read_splits(Path("photos", name))
    monkeypatch.chdir(photos / name)
    with pytest.raises(utils.UserError, match="train not found. Its parent .*: --dataset ..$"):
        read_splits(Path("."))


def test_run_without_val_goes_on_and_is_evaluated_with_its_own_hold_out_alone(photos, capsys):
    shutil.rmtree(photos / "val")
    flags = ["--holdout-per-class", "3", "--dataset"]
    train.main([*TRAIN, "1", *flags, "photos"])
    assert "8 training and 6 validation images" in capsys.readouterr().out
    evaluate.main(EVALUATE)
    said = capsys.readouterr().out
    assert "photos: 6 hold-out images, because there is no test/ or val/" in said
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
        ("rm -r train", "photos/train not found. Expected train/ and val/ with one sub-folder of"),
        ("rm -r train val", "photos/train not found. Expected train/ and val/ with one sub-folder"),
        (
            "mv val/* . && rm -r train val",
            r"photos/train not found. Move the .* \(one, zero, ...\) into it. Without val/",
        ),
        ("mkdir in && mv train val in", "photos/train not found. It is .*: --dataset .*photos/in"),
        ("rm -r val", "photos/val not found. Without val/, --holdout-per-class N"),
        ("mv val test", "photos/val not found. .*photos/test is for evaluate.py alone. Without"),
        ("rm -r train/*", "photos/train has no sub-folders. Expected one for each class"),
        ("rm -r train/one", "photos/train has 1 class, zero. Expected at least 2"),
        ("mkdir train/none", "train/none has no picture"),
        ("truncate -s 0 train/one/*", "train/one has no picture that can be decoded"),
        ("truncate -s 0 val/zero/*", "val/zero has no picture that can be decoded"),
        ("mkdir val/ones", "val: 'ones' is not one of the 2 classes trained on. Was it .* 'one'"),
        ("rm -r val/*", "photos/val has no sub-folders"),
        ("rm -r val/*/*", "photos/val has no picture"),
        (
            "mv val/one val/Zero",
            "val: 'Zero' is not one of the 2 classes trained on. Was it .* 'zero'",
        ),
        (
            "for x in train/one/*; do echo > $x.raw; rm $x; done",
            "train/one has no picture: files that Pillow cannot read: 12 .raw$",
        ),
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
