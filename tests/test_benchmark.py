"""The benchmark at its smallest: figures mean nothing here, table and file must be whole."""

import json
from argparse import Namespace

import benchmark
import pytest
import torch

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


def test_only_the_steps_between_warm_up_and_prefetched_rest_are_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    args, seconds, used = Namespace(warmup_steps=2, steps=3), [], []
    for batch in benchmark.time_steps(range(9), args, torch.device("cpu"), seconds):
        used.append(batch)
        clock[0] += 100 if batch < 2 else 1
    assert used == [0, 1, 2, 3, 4]
    assert seconds == [3.0]


def test_an_impossible_size_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--image-size", "8"])
    assert stop.value.code == 2
    assert "--image-size 8: expected 32 to 1,024" in capsys.readouterr().err
