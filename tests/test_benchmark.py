"""The benchmark at its smallest: figures mean nothing here, table and file must be whole."""

import json
from argparse import Namespace

import benchmark
import pytest
import torch
from torch._dynamo import OptimizedModule

import model as resnet
import train
import utils
from model import build_model

TINY = ["--device", "cpu", "--precision", "fp32", "--image-size", "32", "--batch-size", "2"]
TINY += ["--steps", "1", "--warmup-steps", "1", "--repeats", "1"]


@pytest.mark.slow
def test_one_run_measures_everything_without_data_and_says_so(tmp_path, capsys):
    file = tmp_path / "speed.json"
    benchmark.main([*TINY, "--data-dir", str(tmp_path), "--json", str(file)])
    result, table = json.loads(file.read_text()), capsys.readouterr().out
    for name in ("ceiling", "classic", "careful"):
        assert result[f"ours_over_{name}"] == pytest.approx(result["ours"] / result[name])
    for name in ("ours", "ceiling", "classic", "careful", "evaluation", "augmentation"):
        assert f"\n{name} " in table
    assert "random pixels" in table and "random pixels" in result["data"]
    assert result["device"] in table and result["versions"]["torch"] == torch.__version__
    assert result["start_seconds"]["step"] > 0
    assert "\nturns    1 of each variant, " in table


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which stands still until the test moves it."""
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    return now


def setup(**args: object) -> benchmark.Setup:
    return benchmark.Setup(Namespace(**args), torch.device("cpu"), None)


def test_only_the_steps_between_warm_up_and_prefetched_rest_are_timed(clock):
    used = []

    def step(batch: int, labels: int) -> int:
        used.append(batch)
        clock[0] += 100 if batch < 2 else 1
        return 0

    batches = iter(zip(range(9), range(9)))
    settings = setup(warmup_steps=2, steps=3, batch_size=10)
    assert next(benchmark.time_steps(settings, batches, step)) == 10
    assert used == [0, 1, 2, 3, 4] and next(batches, None) is None


@pytest.mark.parametrize(("seconds", "turns"), [(100, 3), (30, 4), (1, 5)])
def test_turns_end_with_the_budget_but_not_before_the_third(seconds, turns, clock):
    """Two variants: turns of 200, 60 and 2 seconds; the budget ends after 250."""

    def variant():
        while True:
            clock[0] += seconds
            yield 1.0

    variants = {"one": variant(), "other": variant()}
    measured = benchmark.take_turns(setup(repeats=5), variants, deadline=250)
    assert [len(rates) for rates in measured["repeats"].values()] == [turns, turns]


@pytest.mark.parametrize(("rate", "steps"), [(4.0, 1), (16.0, 4), (1600.0, 8)])
def test_steps_are_fitted_to_three_turns_before_the_deadline(rate, steps, clock, monkeypatch):
    """At 16 images/s a step takes 1 s: two variants have 6 each in 12 s, 2 of them to warm up."""
    variants = {name: (rate for _ in range(1)) for name in ("one", "other")}
    monkeypatch.setattr(benchmark, "make_variants", lambda trial: variants)
    assert benchmark.fit_steps(setup(batch_size=16, warmup_steps=2), deadline=36) == steps


@pytest.mark.parametrize("compile_it", [True, False])
def test_compiled_is_compiled_and_the_others_are_not(compile_it, monkeypatch):
    monkeypatch.setattr(utils, "can_compile", lambda device: True)
    monkeypatch.setattr(resnet, "build_model", lambda *args: build_model("resnet18", 10))
    args = utils.parse_flags(train.__file__, ["--precision", "fp32"])
    run = benchmark.start_run(setup(**vars(args)), compile_it)
    assert isinstance(run.network, OptimizedModule) == compile_it


def test_an_impossible_size_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--image-size", "8"])
    assert stop.value.code == 2
    assert "--image-size 8: expected 32 to 1,024" in capsys.readouterr().err
