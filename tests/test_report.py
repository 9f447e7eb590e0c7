"""evaluate.py's page: what is in the file, and what Chromium shows and does where it is installed."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from PIL import Image
from scripts import run_script
from sklearn.metrics import f1_score

import data
import evaluate

in_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\u4e2d&amp;'\""]
# Image i is a square of gray 20 * i. The fourth and the last two are mistakes, the last the surest.
LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 2])
PREDICTED = np.array([0, 0, 1, 2, 1, 2, 0, 1])
OTHER = np.array([0, 1, 1, 1, 1, 2, 0, 1])  # right on the fourth and wrong on the second
CONFIDENCE = np.array([0.9, 0.8, 0.7, 0.55, 0.6, 0.95, 0.65, 0.85])
IMAGES = torch.arange(8, dtype=torch.uint8)[:, None, None, None].mul(20).expand(8, 3, 16, 16)


def make_result(predicted: np.ndarray, classes: list[str]) -> evaluate.Result:
    summary = {"images": 8, "dataset": "8 pictures", "test_images_chose_checkpoint": True}
    summary |= {"checkpoint": "run/best.pt", "epoch": 3, "tta": False, "loss": 1.25}
    summary |= {"intervals_95": {}, "top1_accuracy": 5 / 8, "classes_without_images": []}
    summary["constants"] = {"seed": 0, "dataset": "photos"}
    return evaluate.Result(classes, LABELS, predicted, CONFIDENCE, "results", summary)


def write(folder: Path, classes: list[str], names: list[str], check=None) -> Path:
    """The page of the images above, compared with another network."""
    result, other = make_result(PREDICTED, classes), make_result(OTHER, classes)
    result.summary["comparison"] = evaluate.compare([result], [other])
    lines = {"numbers": evaluate.describe_numbers(result), "check": [("copies", "some")]}
    test = data.Split(IMAGES, torch.from_numpy(LABELS), names)
    evaluate.write_report(result, test, [other], check, lines, folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """With two copies and a suspect label."""
    facts = {"copies": 1, "undecided": False, "threshold": 0.75}
    pairs = [
        ([f"val/{i}.png", f"train/{i}.png", 0.9 - i / 4, "cat", "dog", False], [x, y])
        for i, (x, y) in enumerate([(IMAGES[7], IMAGES[6]), (IMAGES[5], IMAGES[4])])
    ]
    suspect = ["training", "train/9.png", "cat", "fox", 0.001, 0.9]
    check = evaluate.DataCheck(facts, None, pairs, [(suspect, [IMAGES[3]])])
    names = [f"val/{i}.jpg" for i in range(8)]
    return write(tmp_path_factory.mktemp("page"), ["cat", "dog", "fox"], names, check)


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory) -> Path:
    names = ["</script>", "<b>", *(f"\udce9{i}" for i in range(6))]
    return write(tmp_path_factory.mktemp("hostile"), HOSTILE, names)


class Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.contents, self.policy = [], [], ""

    def handle_starttag(self, tag: str, attributes: list[tuple]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "content" and "default-src" in value:
                self.policy = value

    def handle_data(self, text: str) -> None:
        self.contents.append((self.tags[-1], text))


def parse(path: Path) -> tuple[Parser, dict]:
    """The page, and what its script reads."""
    parser = Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    texts = [text for tag, text in parser.contents if tag == "script"]
    return parser, json.loads(texts[0])


# ---- the file -----------------------------------------------------------------------------------


def test_page_requests_nothing_and_allows_nothing_but_its_own_script_and_style(page):
    parser, _ = parse(page)
    assert "default-src 'none'" in parser.policy and "unsafe" not in parser.policy
    for tag in ("style", "script"):
        texts = [text for name, text in parser.contents if name == tag]
        assert any(evaluate.as_source(text) in parser.policy for text in texts)
    assert not re.search(r"https?:|<link|src=|@import", page.read_text())


def test_names_are_never_markup(page, hostile_page):
    (plain, _), (hostile, content) = parse(page), parse(hostile_page)
    assert hostile.tags == plain.tags and hostile.tags.count("script") == 2
    assert content["classes"] == HOSTILE
    assert set(content["images"]["name"][:8]) == {
        "</script>",
        "<b>",
        *map("\udce9{}".format, range(6)),
    }


def test_every_tile_is_the_image_that_its_row_names(page):
    _, content = parse(page)
    rows = [int(re.search(r"\d", name)[0]) for name in content["images"]["name"]]
    assert content["first_image"] == 5  # after two pairs and a suspect
    (sheet,) = content["sheets"]
    picture = Image.open(BytesIO(base64.b64decode(sheet.split(",")[1])))
    side = content["side"]
    assert side == 4 and picture.size == (64, 64)
    grays = [picture.getpixel((16 * (i % side) + 8, 16 * (i // side) + 8))[0] for i in range(16)]
    assert rows[:3] == [7, 6, 3] and set(rows[3:]) == {0, 1, 2, 4, 5}  # mistakes first, the surest
    expected = [7, 6, 5, 4, 3, *rows]
    assert grays[:13] == pytest.approx([20 * i for i in expected], abs=2)
    images = content["images"]
    assert images["label"] == LABELS[rows].tolist() and images["other"] == OTHER[rows].tolist()
    assert images["predicted"] == PREDICTED[rows].tolist()


def test_page_of_10000_pictures_stays_below_10_megabytes(tmp_path):
    """Of noise, which no JPEG makes smaller."""
    noise = torch.randint(256, (100, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    noise, labels = noise.byte(), np.arange(10_000) % 100
    names = [f"val/{label:040}/{i:040}.jpg" for i, label in enumerate(labels)]
    columns = {"name": names, "label": labels.tolist()}
    images = [noise[i % 100] for i in range(10_000)]
    evaluate.write_page(tmp_path / "page.html", {}, [], columns, images)
    _, content = parse(tmp_path / "page.html")
    assert 4e6 < (tmp_path / "page.html").stat().st_size < 10e6
    room = content["side"] ** 2 * len(content["sheets"])
    assert 256 <= len(content["images"]["name"]) == len(content["images"]["label"]) == room


# ---- in a browser -------------------------------------------------------------------------------


@in_chromium
@pytest.mark.slow
def test_clicks_on_a_cell_a_class_and_a_column_show_what_they_say(page):
    with Browser(page) as browser:
        assert browser.text("h1") == "run/best.pt, epoch 3"
        assert "8 pictures of photos: the checkpoint was selected on them" in browser.text("#lines")
        assert browser.text("#which") == "3 images: mistakes, the surest first"
        captions = browser.texts("#images figcaption")
        assert captions[0] == "fox\ntaken for dog, 85.0 %\nval/7.jpg\nother: dog"
        # true fox, predicted dog: cells of 36 pixels beside names of 3 letters
        browser.click("#matrix", 29 + 1.5 * 36, 29 + 2.5 * 36)
        assert browser.run("location.hash") == "#cell=2,1"
        assert browser.text("#which") == "1 image: fox taken for dog"
        assert browser.text("#tip") == "fox taken for dog: 1 of 3 images"
        assert browser.texts("#images figcaption") == captions[:1]
        browser.click("#sections td a[href='#class=0']")
        assert browser.text("#which") == "3 images: cat, and what was taken for it"
        assert [x.split("\n")[2] for x in browser.texts("#images figcaption")] == [
            "val/6.jpg",
            "val/0.jpg",
            "val/1.jpg",
        ]
        names = "#sections section:first-child td:first-child"
        f1 = f1_score(LABELS, PREDICTED, average=None)
        worst_first = [["cat", "dog", "fox"][i] for i in np.argsort(f1, kind="stable")]
        assert browser.texts(names) == worst_first
        for order in (["cat", "dog", "fox"], ["fox", "dog", "cat"]):
            browser.click("#sections section:first-child th button")
            assert browser.texts(names) == order
        assert browser.run("document.querySelector('th').ariaSort") == "descending"
        assert browser.run("document.activeElement.innerText").startswith("class")


@in_chromium
@pytest.mark.slow
def test_address_opens_pairs_and_what_only_one_network_has_right(page):
    with Browser(page) as browser:
        for address, title, count in [
            ("pair=1,2", "5 images: dog and fox", 5),
            ("gained", "1 image: right only here", 1),
            ("lost", "1 image: right only in the other", 1),
            ("cell=0,9", "3 images: mistakes, the surest first", 3),
        ]:
            browser.run(f"location.hash = '{address}'")
            browser.run("new Promise(done => setTimeout(done, 50))")
            assert browser.text("#which") == title
            assert len(browser.texts("#images figure")) == count
        assert browser.texts("#contents button") == browser.texts("#sections h2")
        browser.run("scrollTo(0, 0)")
        browser.click("#contents button:last-child")
        assert browser.run("scrollY") > 0
        copies, suspects = "#sections .gallery:nth-child(4)", "#sections .gallery:nth-child(6)"
        assert browser.texts(f"{copies} figcaption") == [
            "similarity 0.900: probably a copy\ntest val/0.png: cat\ntraining train/0.png: dog",
            "similarity 0.650: below the limit\ntest val/1.png: cat\ntraining train/1.png: dog",
        ]
        assert len(browser.texts(f"{copies} .tile")) == 4
        assert browser.texts(f"{suspects} figcaption") == [
            "label cat: 0.10 %\nrather fox: 90.0 %\ntrain/9.png"
        ]
        assert "1 of 1" in browser.text(suspects)


@in_chromium
@pytest.mark.slow
def test_hostile_names_are_shown_as_they_are_and_nothing_runs_or_is_requested(hostile_page):
    with Browser(hostile_page) as browser:
        names = browser.texts("#sections section:first-child td:first-child")
        assert sorted(names) == sorted(HOSTILE)
        browser.run("location.hash = 'class=0'")
        browser.run("new Promise(done => setTimeout(done, 50))")
        assert HOSTILE[0] in browser.text("#which")
        captions = browser.texts("#images figcaption")
        assert any(caption.split("\n")[2] == "</script>" for caption in captions)
        assert browser.run("document.querySelectorAll('img, script').length") == 3  # its own
        requests = [x for x in browser.events if x.get("method") == "Network.requestWillBeSent"]
        addresses = [x["params"]["request"]["url"].split(":")[0] for x in requests]
        assert set(addresses) <= {"file", "data"} and addresses.count("file") == 1
        kinds = {x.get("method") for x in browser.events}
        assert not kinds & {"Runtime.exceptionThrown", "Page.javascriptDialogOpening"}


@in_chromium
@pytest.mark.slow
def test_page_fits_a_phone_and_shows_pictures_of_ones_own(finished_run, tmp_path):
    for index, image in enumerate(data.read_digits("test")[0].images[:2]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    flags = ["--checkpoint", str(finished_run / "demo/best.pt"), "--images", "0.png", "1.png"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path)
    assert script.status == 0, script.stderr
    with Browser(tmp_path / "results" / "pictures.html", width=390, dark=True) as browser:
        assert browser.run("document.documentElement.scrollWidth") == 390
        captions = browser.texts("figcaption")
        assert [caption.split("\n")[0] for caption in captions] == ["0.png", "1.png"]
        said = " ".join(script.stdout.split())
        assert all(" ".join(caption.split()) in said for caption in captions)
