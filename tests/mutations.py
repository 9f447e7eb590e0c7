"""Puts one fault at a time into a copy of the project and runs the tests that should notice it.

    python tests/mutations.py                 about ten seconds per fault
    python tests/mutations.py evaluate.py     those of one file

To add one: the file, the text, what it becomes, the tests that run. The text
must occur once. The exit status is 1 if a fault survives.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES, CIFAR, RANDOM = (
    f"tests/test_{name}.py" for name in ("pictures", "cifar100", "randomness")
)
FROZEN = "tests/test_recipes.py -k frozen_stages"
IMAGES = "tests/test_folder.py -k two_classes"
FOLDER = "tests/test_folder.py -k 'memory or folders_that_people or many_bits or transparent'"
PLAN = "tests/test_plan.py -k 'rung or hand or earlier or cosine or measured'"
FAULTS = [
    # evaluate.py: numbers
    ("evaluate.py", "labels, logits, k=5", "labels, logits, k=4", CIFAR),
    ("evaluate.py", "weights=result.support > 0", "weights=result.support", CIFAR),
    ("evaluate.py", "np.argsort(self.f1[tested]", "np.argsort(-self.f1[tested]", CIFAR),
    ("evaluate.py", "95 % interval {100 * low:.2f} to {100 * high:.2f} %\"\n        if name", "95 % interval {low:.2f} to {high:.2f} %\"\n        if name", CIFAR),
    ("evaluate.py", "default_rng(0).multinomial", "default_rng().multinomial", CIFAR),
    ("evaluate.py", "if not torch.cat(logits).isfinite().all():", "if False:", CIFAR),
    ("evaluate.py", "superclasses.trace()", "superclasses.sum()", CIFAR),
    ("data.py", "reshape(20, 5, 20, 5).sum((1, 3))", "reshape(20, 5, 20, 5).sum((0, 2))", CIFAR),
    # evaluate.py: pictures
    ("evaluate.py", "matrix / matrix.sum(1, keepdims=True)", "matrix / matrix.sum(0, keepdims=True)", PICTURES),
    ("evaluate.py", 'xlabel="predicted class", ylabel="true class"', 'xlabel="true class", ylabel="predicted class"', PICTURES),
    ("evaluate.py", "sns.heatmap(fractions,", "sns.heatmap(fractions.T,", PICTURES),
    ("evaluate.py", "result.most_confident[~result.correct[", "result.most_confident[result.correct[", PICTURES),
    ("evaluate.py", "np.argsort(-self.confidence, kind", "np.argsort(self.confidence, kind", PICTURES),
    ("evaluate.py", "best = utils.best_epoch(history, watch)", "best = history[-1]", PICTURES),
    ("evaluate.py", 'classifier.constants["stored_size"] or 32)\n    prob', '32)\n    prob', IMAGES),
    # randomness
    ("data.py", "mix_seed(self.settings.seed, epoch))\n        count", "mix_seed(self.settings.seed))\n        count", RANDOM),
    ("data.py", "mix_seed(self.settings.seed, epoch))\n        count", "mix_seed(0, epoch))\n        count", RANDOM),
    ("data.py", "generator=generator).argsort(1).tolist()", "generator=generator).argsort(1).mul(0).add(torch.arange(4)).tolist()", RANDOM),
    ("data.py", "rng = np.random.default_rng(seed)\n    cut", "rng = np.random.default_rng(0)\n    cut", RANDOM),
    ("train.py", "torch.manual_seed(data.mix_seed(args.seed, epoch, loader.rank))", "torch.manual_seed(data.mix_seed(args.seed, loader.rank))", RANDOM),
    ("train.py", "torch.manual_seed(data.mix_seed(args.seed, epoch, loader.rank))", "torch.manual_seed(data.mix_seed(args.seed, epoch))", RANDOM),
    ("train.py", "order = torch.randperm(len(labels), generator=generator).to(labels.device)\n        loss_sum", "order = torch.arange(len(labels)).to(labels.device)\n        loss_sum", RANDOM),
    ("train.py", "torch.manual_seed(data.mix_seed(args.seed))  # for the new layers", "pass", RANDOM),
    ("train.py", '"accuracy": "max"', '"accuracy": "min"', RANDOM),
    ("train.py", 'run.scheduler.step(row[f"val_{args.watch}"])', 'run.scheduler.step(row["val_loss"])', RANDOM),
    ("utils.py", 'sign = 1 if watch == "accuracy" else -1', "sign = -1", RANDOM),
    ("train.py", '"weight_decay": args.weight_decay', '"weight_decay": args.weight_decay / 2', RANDOM),
    ("data.py", "zlib.crc32(split.images.numpy(), zlib.crc32(split.labels.numpy()))", "zlib.crc32(split.images.numpy())", RANDOM),
    # the recipe, safety, folders
    ("model.py", "nn.ModuleList(stem_and_stages).requires_grad_(False)", "pass", FROZEN),
    ("utils.py", "weights_only=True", "weights_only=False", CIFAR),
    ("data.py", "        except MemoryError:\n            raise\n        except Exception as error:  # noqa: BLE001, its type depends on what is wrong with the file", "        except Exception as error:  # noqa: BLE001, its type depends on what is wrong with the file", FOLDER),
    ("data.py", 'return name.startswith(".") or name in ("@eaDir", "__MACOSX")', "return False", FOLDER),
    ("data.py", "if values.max() <= x", "if x == 65535", FOLDER),
    ("data.py", 'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")', FOLDER),
    # --minutes
    ("train.py", "possible > max(done, epochs - 1)", "possible > epochs", PLAN),
    ("train.py", "margin * (epochs - begun)", "margin * epochs", PLAN),
    ("train.py", "once + args.epochs * seconds", "once + seconds", PLAN),
    ("train.py", "(2 * forward if roughly", "(4 * forward if roughly", PLAN),
    ("train.py", "max(run.end - args.warmup_epochs, 1e-9)", "(args.epochs - args.warmup_epochs)", PLAN),
]  # fmt: skip


def main() -> None:
    chosen = [fault for fault in FAULTS if not sys.argv[1:] or fault[0] in sys.argv[1:]]
    survivors, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
        for name in filter(None, names):
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder, name))
        if (ROOT / "data").exists():
            Path(folder, "data").symlink_to(ROOT / "data")
        for name, old, new, tests in chosen:
            path = Path(folder, name)
            source = path.read_text()
            if source.count(old) != 1:
                raise SystemExit(f"{name} has {old!r} {source.count(old)} times: expected once")
            path.write_text(source.replace(old, new))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", *shlex.split(tests)]
            done = subprocess.run(
                command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False
            )
            path.write_text(source)
            if done.returncode not in (0, 1):
                raise SystemExit(done.stdout + done.stderr)
            survivors += done.returncode == 0
            verdict = "SURVIVED" if done.returncode == 0 else "noticed "
            reason = next((x for x in done.stdout.splitlines() if x.startswith("FAILED")), "")
            print(f"{verdict} {name}: {old!r} -> {new!r}  {reason}"[:250], flush=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(chosen) - survivors} of {len(chosen)} faults noticed in {minutes:.1f} minutes")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
