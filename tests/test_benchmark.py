"""The benchmark at its smallest: figures mean nothing here, table and file must be whole."""

import json
from argparse import Namespace

import benchmark
import pytest
import torch
from torch._dynamo import OptimizedModule

import train
import utils

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


def test_only_the_steps_between_warm_up_and_prefetched_rest_are_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    args, seconds, used = Namespace(warmup_steps=2, steps=3), [], []
    for batch in benchmark.time_steps(range(9), args, torch.device("cpu"), seconds):
        used.append(batch)
        clock[0] += 100 if batch < 2 else 1
    assert used == [0, 1, 2, 3, 4]
    assert seconds == [3.0]


@pytest.mark.parametrize(("seconds", "turns"), [(100, 3), (30, 4), (1, 5)])
def test_turns_end_with_the_budget_but_not_before_the_third(seconds, turns, monkeypatch):
    """Two variants: turns of 200, 60 and 2 seconds; the budget ends after 250."""
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def variant():
        while True:
            clock[0] += seconds
            yield 1.0

    variants, cpu = {"one": variant(), "other": variant()}, torch.device("cpu")
    measured = benchmark.take_turns(Namespace(repeats=5), cpu, variants, deadline=250)
    assert [len(rates) for rates in measured["repeats"].values()] == [turns, turns]


def test_compiled_is_compiled_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr(utils, "can_compile", lambda device: True)
    args = utils.parse_flags(train.__file__, ["--precision", "fp32"])
    for compile_it in (True, False):
        run = benchmark.start_run(args, torch.device("cpu"), compile_it)
        assert isinstance(run.network, OptimizedModule) == compile_it


@pytest.mark.parametrize(("rate", "steps"), [(4.0, 1), (16.0, 4), (1600.0, 8)])
def test_steps_are_fitted_to_three_turns_before_the_deadline(rate, steps, monkeypatch):
    """At 16 images/s a step takes 1 s: two variants have 6 each in 12 s, 2 of them to warm up."""
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: 0.0)
    variants = {name: (rate for _ in range(1)) for name in ("one", "other")}
    monkeypatch.setattr(benchmark, "make_variants", lambda *trial: variants)
    args = Namespace(batch_size=16, warmup_steps=2)
    assert benchmark.fit_steps(args, torch.device("cpu"), None, deadline=36) == steps


def test_an_impossible_size_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--image-size", "8"])
    assert stop.value.code == 2
    assert "--image-size 8: expected 32 to 1,024" in capsys.readouterr().err
