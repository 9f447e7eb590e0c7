"""Puts one fault at a time into a copy of the project and runs the tests that should notice it.

    python tests/mutations.py                 about twenty seconds per fault
    python tests/mutations.py evaluate.py     those in one file, or that one file of tests notices

To add one: the file, the text, what it becomes, the tests that run. The text
must occur once. The exit status is 1 if a fault survives.
"""

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
REPORT = "tests/test_report.py"
REPEATS = "tests/test_recipes.py -k repeats"
CHECK = "tests/test_check_data.py"
COPIES = CHECK + " -k 'copies or copy'"
FROZEN = "tests/test_recipes.py -k frozen_stages"
IMAGES = "tests/test_folder.py -k two_classes"
FOLDER = "tests/test_folder.py -k 'not (trained or hold_out or goes_on or alone or told or huge)'"
INPUT, TRAIN, RECIPES = (f"tests/test_{name}.py" for name in ("data", "train", "recipes"))
PROCESSES, FAULTY = "tests/test_processes.py", "tests/test_faults.py"
CLOCK = "tests/test_clock.py"
TIMEOUT = 600  # seconds; a fault that lets a test wait for ever is noticed, too
FAULTS = [
    # evaluate.py: numbers
    ("evaluate.py", "labels, logits, k=5", "labels, logits, k=4", CIFAR),
    ("evaluate.py", "weights=result.support > 0", "weights=result.support", CIFAR),
    ("evaluate.py", "np.argsort(self.f1[tested]", "np.argsort(-self.f1[tested]", CIFAR),
    ("evaluate.py", "{100 * low:{sign}.2f} to {100 * high:{sign}.2f}", "{low:{sign}.2f} to {high:{sign}.2f}", CIFAR),
    ("evaluate.py", "default_rng(0), [], []", "default_rng(), [], []", CIFAR),
    ("evaluate.py", "if not logits.isfinite().all():", "if False:", CIFAR),
    ("evaluate.py", "superclasses.trace()", "superclasses.sum()", CIFAR),
    ("data.py", "reshape(20, 5, 20, 5).sum((1, 3))", "reshape(20, 5, 20, 5).sum((0, 2))", CIFAR),
    # evaluate.py: pictures
    ("evaluate.py", "matrix / matrix.sum(1, keepdims=True)", "matrix / matrix.sum(0, keepdims=True)", PICTURES),
    ("evaluate.py", 'xlabel="predicted class", ylabel="true class"', 'xlabel="true class", ylabel="predicted class"', PICTURES),
    ("evaluate.py", "sns.heatmap(fractions,", "sns.heatmap(fractions.T,", PICTURES),
    # evaluate.py: the page
    ("evaluate.py", "wrong = surest[~result", "wrong = surest[result", REPORT),
    ("evaluate.py", "np.argsort(-result.confidence, kind", "np.argsort(result.confidence, kind", REPORT),
    ("evaluate.py", 'replace("<",', 'replace("@",', REPORT),
    ("evaluate.py", '"first_image": len(pictures)', '"first_image": 0', REPORT),
    ("evaluate.py", "        if room < 0:\n", "        if False:\n", REPORT),
    ("evaluate.py", "button.onclick = () => section.scrollIntoView();", "", REPORT + " -m slow"),
    ("evaluate.py", "script-src {script}", "script-src 'unsafe-inline'", REPORT),
    ("utils.py", "best = best_epoch(history, watch)", "best = history[-1]", PICTURES),
    ("evaluate.py", 'constants["stored_size"] or 32,', "32,", IMAGES),
    ("model.py", 'extra_files={"classes.json": json.dumps(classes)}', 'extra_files={"classes.json": json.dumps(classes[::-1])}', CIFAR + " -k readme_predicts"),
    ("data.py", "thumbnails.view(-1, 8, 8).flip(2)", "thumbnails.view(-1, 8, 8).flip(1)", COPIES),
    ("evaluate.py", 'mode = self.constants["interpolation"]', 'mode = "bilinear"', REPEATS),
    ("data.py", "self.image_size, self.mode = image_size, mode", 'self.image_size, self.mode = image_size, "bilinear"', INPUT),
    ("evaluate.py", 'axes.secondary_yaxis("right").set_yticks(middles, groups)', 'axes.secondary_yaxis("right").set_yticks(middles, groups[::-1])', PICTURES),
    # evaluate.py: two evaluations, copies
    ("evaluate.py", "run_variance = run_variance or noise_variance", "pass", "tests/test_compare.py"),
    ("evaluate.py", "- noise_variance * (1 / runs", "- noise_variance * 2 * (1 / runs", "tests/test_compare.py"),
    ("evaluate.py", "    if len(labels) < 2:\n", "    if False:\n", "tests/test_compare.py -k single"),
    ("evaluate.py", "path = Path(folder)  # what follows", "pass  # what follows", "tests/test_compare.py -k cannot_be"),
    ("evaluate.py", "    if len(these) > 1:\n", "    if len(these) > 9:\n", "tests/test_compare.py"),
    ("evaluate.py", "if names or len({*seeds}) < len(seeds):", "if names:", "tests/test_compare.py"),
    ("evaluate.py", '    if check.facts["undecided"]:\n        return scores', "    if False:\n        return scores", CHECK + " -k decided"),
    ("evaluate.py", "if begun and begun != resnet.checksum(model):", "if False:", CHECK + " -k changed"),
    ("evaluate.py", "share = own / thresholds[split.labels]", "share = own", CHECK + " -k relative"),
    ("evaluate.py", "torch.full((len(labels), num_classes), torch.nan)", "torch.zeros(len(labels), num_classes)", CHECK + " -k five"),
    ("data.py", "train.stored, train.rows[j]", "train.stored, j", COPIES),
    ("data.py", "test.stored, test.rows[i]", "test.stored, i", COPIES),
    ("data.py", "nearest[sample, -1]", "nearest[sample, 0]", CHECK + " -k frames"),
    ("evaluate.py", "[test.files[index], train.files[other]]", "[test.files[index], train.files[index]]", CHECK),
    ("evaluate.py", "head.fit(inputs[training], classes[training])", "head.fit(inputs, classes)", CHECK),
    # randomness
    ("data.py", "mix_seed(self.settings.seed, epoch))\n        count", "mix_seed(self.settings.seed))\n        count", RANDOM),
    ("data.py", "mix_seed(self.settings.seed, epoch))\n        count", "mix_seed(0, epoch))\n        count", RANDOM),
    ("data.py", "generator=generator).argsort(1).tolist()", "generator=generator).argsort(1).mul(0).add(torch.arange(4)).tolist()", RANDOM),
    ("data.py", "rng = np.random.default_rng(seed)\n    cut", "rng = np.random.default_rng(0)\n    cut", RANDOM),
    ("train.py", "torch.manual_seed(utils.mix_seed(args.seed, epoch, loader.rank))", "torch.manual_seed(utils.mix_seed(args.seed, loader.rank))", RANDOM),
    ("train.py", "torch.manual_seed(utils.mix_seed(args.seed, epoch, loader.rank))", "torch.manual_seed(utils.mix_seed(args.seed, epoch))", RANDOM),
    ("train.py", "order = torch.randperm(len(labels), generator=generator).to(labels.device)\n        loss_sum", "order = torch.arange(len(labels)).to(labels.device)\n        loss_sum", RANDOM),
    ("model.py", "torch.manual_seed(utils.mix_seed(args.seed))  # for the new layers", "pass", RANDOM),
    ("train.py", '"accuracy": "max"', '"accuracy": "min"', RANDOM),
    ("train.py", 'run.scheduler.step(row[f"val_{args.watch}"])', 'run.scheduler.step(row["val_loss"])', RANDOM),
    ("utils.py", 'sign = 1 if watch == "accuracy" else -1', "sign = -1", RANDOM),
    ("train.py", '"weight_decay": args.weight_decay', '"weight_decay": args.weight_decay / 2', RANDOM),
    ("data.py", "total = zlib.crc32(split.labels.numpy())", "total = 0", RANDOM),
    # the recipe, safety, folders
    ("model.py", "nn.ModuleList(stem_and_stages).requires_grad_(False)", "pass", FROZEN),
    ("train.py", 'settings["FREEZE_BATCH_NORM"] = stages > 0', 'settings["FREEZE_BATCH_NORM"] = True', CLOCK),
    ("train.py", "if args.weights and images_at_224 > 50_000:", "if images_at_224 > 50_000:", CLOCK),
    ("utils.py", "weights_only=True", "weights_only=False", CIFAR),
    ("data.py", "        except MemoryError:\n            raise\n        except Exception as error:  # noqa: BLE001, its type depends on what is wrong with the file", "        except Exception as error:  # noqa: BLE001, its type depends on what is wrong with the file", FOLDER),
    ("data.py", 'return name.startswith(".") or name in ("@eaDir", "__MACOSX")', "return False", FOLDER),
    ("data.py", "if values.max() <= x", "if x == 65535", FOLDER),
    ("data.py", 'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")', FOLDER),
    ("data.py", "size, whole = settings.stored_size or 32,", "size, whole = 32,", FOLDER),
    ("model.py", "check_hash=True", "check_hash=False", CHECK + " -k torchvision_weights"),
    ("model.py", "    if not with_head:", "    if False:", "tests/test_model.py"),
    ("model.py", "weights, path = get_model_weights(architecture)[name],", "weights, path = get_model_weights(architecture).DEFAULT,", CHECK + " -k torchvision_weights"),
    ("model.py", '"_orig_mod.", "model.")', '"model.")', "tests/test_model.py"),
    # the command itself
    ("train.py", "import model as resnet\n", "import matplotlib\nimport model as resnet\n", "tests/test_readme.py"),
    ("train.py", 'return run.optimizer.param_groups[0]["lr"]', "return args.learning_rate", TRAIN),
    ("train.py", "choose_precision(wanted, device)", 'choose_precision("fp32", device)', TRAIN),
    ("model.py", "if compile_it and utils", "if False and utils", "tests/test_benchmark.py"),
    ("train.py", "utils.require_same_settings(checkpoint, last, args)", "pass", TRAIN),
    ("train.py", "utils.move_aside(last.parent)", "pass", TRAIN),
    ("train.py", "            if should_stop(history, args):\n", "            if False:\n", TRAIN),
    ("train.py", "threshold=0\n", "threshold=1e-4\n", TRAIN),
    ("train.py", "run.scheduler.patience = args.scheduler_patience", "run.scheduler.patience = 2", TRAIN),
    ("train.py", "bar.update(loader.batch_size)", "bar.update(1)", TRAIN),
    ("train.py", "torch.zeros_like(parameter)", "torch.ones_like(parameter)", TRAIN),
    ("train.py", "is_best = finish_epoch(run, history, args)", "is_best = finish_epoch(run, history, args) or True", TRAIN),
    ("train.py", "utils.broadcast(run.validated.buffers())", "pass", RECIPES),
    ("train.py", "decay = min(decay, (1 + steps) / (10 +", "decay = min(decay, (1 + steps) / (100 +", RECIPES),
    ("train.py", "return args.learning_rate * cosine(min(1, progress))", "return args.learning_rate * (1 - min(1, progress))", RECIPES),
    ("train.py", "labels = labels.argmax(1)", "labels = labels.argmin(1)", RECIPES),
    ("train.py", "if run.average is not None:\n        run.average.load", "if False:\n        run.average.load", RECIPES),
    ("train.py", "return len(labels) / (num_classes * counts)", "return num_classes * counts / len(labels)", RECIPES),
    ("train.py", "loss = compute_loss(logits, labels[batch], args, class_weights)", "loss = compute_loss(logits, labels[batch], args, None)", RECIPES),
    ("model.py", "module.weight.requires_grad and not freeze_batch_norm", "not freeze_batch_norm", RECIPES),
    ("data.py", "np.where(cut, 1 - area, weight)", "np.where(cut, weight, weight)", RECIPES),
    ("data.py", "(center - half).clip(0)", "(center - half)", RECIPES),
    # saving, resuming, ending
    ("utils.py", "os.fsync(file.fileno())", "pass", "tests/test_saving.py"),
    ("utils.py", 'temporary = path.with_name(path.name + ".tmp")', "temporary = path", "tests/test_saving.py"),
    ("utils.py", "    with _signals_wait():\n", "    if True:\n", "tests/test_saving.py"),
    ("utils.py", "            if is_best:\n", "            states = {name: part.state_dict() for name, part in parts.items()}\n            save_checkpoint(folder / 'last.pt', result | states)\n            if is_best:\n", "tests/test_saving.py"),
    ("utils.py", "os.replace(file, target)", "target.write_bytes(file.read_bytes())", "tests/test_saving.py"),
    ("utils.py", "        except PermissionError:\n            if time", "        except PermissionError:\n            if True or time", "tests/test_saving.py -k holds"),
    ("utils.py", "with _extra(path), atomic_write", "with atomic_write", "tests/test_saving.py -k 'holds or extra'"),
    ("utils.py", "(folder / f\"{name}.tmp\").unlink()", "pass", "tests/test_saving.py -k kill"),
    ("utils.py", 'if checkpoint["classes"] != data_facts["classes"]:', "if False:", "tests/test_saving.py -k classes"),
    ("utils.py", "if was != now:", "if False:", "tests/test_folder.py -k 'goes_on or changed_val'"),
    ("utils.py", 'checkpoint.get("launcher") == this.launcher', "True", PROCESSES),
    ("utils.py", "signal.signal(signum, signal.SIG_IGN)  # a second", "pass  # a second", "tests/test_saving.py"),
    ("utils.py", "if isinstance(error, BrokenPipeError):", "if False:", FAULTY),
    ("utils.py", "128 + error.args[0]", "error.args[0]", FAULTY),
    ("utils.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", FAULTY),
    ("utils.py", "if not tensor.isfinite().all():", "if False:", FAULTY),
    ("utils.py", "damaged = archive.testzip()", "damaged = None", FAULTY),
    ("utils.py", "member.compress_type != zipfile.ZIP_STORED", "False", FAULTY),
    ("utils.py", "print(f\"{label:<8} {text}\", flush=True)", "print(f\"{label:<8} {text}\")", "tests/test_utils.py -k log"),
    ("utils.py", "if signal.getsignal(signum) != signal.SIG_IGN:", "if True:", "tests/test_utils.py"),
    ("utils.py", "except (OSError, ValueError):  # ValueError: it is closed", "except ValueError:", FAULTY + " -k log"),
    ("utils.py", "return open(os.devnull, \"w\")", "return stream", FAULTY + " -k log"),
    ("utils.py", "time.monotonic() - self.last_line >= SECONDS_PER_LINE", "False", FAULTY + " -k lines"),
    ("utils.py", "time.time() - path.stat().st_mtime < 10", "True", TRAIN),
    ("utils.py", "[i / len(head) - 1 for i in range(1, len(head) + 1)]", "[i / len(head) - 1 for i in range(len(head))]", PICTURES),
    # constants as flags, devices, processes
    ("utils.py", "    settings |= given\n", "", "tests/test_utils.py"),
    ("utils.py", "settings[name] = _expand_home(value)", "pass", "tests/test_utils.py -k tilde"),
    ("utils.py", "groups[heading].add_argument(", "parser.add_argument(", "tests/test_utils.py -k groups"),
    ("utils.py", "and low <= value <= high)", "and low <= value)", "tests/test_utils.py"),
    ("utils.py", "kind = type(allowed[0] if allowed else value)", "kind = type(value)", "tests/test_utils.py"),
    ("utils.py", 'capabilities.get("avx512_bf16") or capabilities', "capabilities", "tests/test_utils.py"),
    ("utils.py", "libc.mallopt(M_TRIM_THRESHOLD, -1)", "pass", "tests/test_utils.py"),
    ("utils.py", "if first.get(name) != other.get(name):", "if False:", PROCESSES),
    ("utils.py", "if store.check([\"failed\"]):", "if False:", PROCESSES + " -k 'fails or silent'"),
    ("utils.py", "    if not _leaves.wait(5):  # in a", "    if False:  # in a", PROCESSES + " -k silent"),
    ("utils.py", "_first_failure = [nobody, reason]", "pass", PROCESSES + " -k keeps_the_store"),
    ("evaluate.py", "may_differ |= utils.CHOSEN_BY_THE_CLOCK", "pass", CLOCK + " -k one_recipe"),
    ("utils.py", "patience = SILENCE if beats else START", "patience = START", PROCESSES + " -k silent"),
    ("utils.py", "_announce(store, rank, reason)", "[rank, reason]", PROCESSES + " -k 'fails or flag'"),
    ("utils.py", "if _store is None or not isinstance(error, RuntimeError):", "if False:", "tests/test_utils.py"),
    ("utils.py", "if this.machines > 1 and this.max_restarts:", "if False:", PROCESSES),
    ("utils.py", "return [total / total_count for total in totals]", "return [total / count for total in totals]", RECIPES),
    ("utils.py", "dist.all_reduce(values)", "pass", RECIPES),
    # CIFAR-100's files
    ("data.py", "socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)", "pass", FAULTY),
    ("data.py", "damaged = path.exists() and not check_integrity(path, md5)", "damaged = False", FAULTY),
    ("data.py", "CIFAR100.filename, CIFAR100.tgz_md5", "CIFAR100.filename, None", FAULTY),
    # the images on the device
    ("data.py", "images.flip(3), images)", "images.flip(2), images)", INPUT),
    ("data.py", "(images - self.mean) / self.std", "(images - self.std) / self.mean", INPUT),
    ("data.py", "antialias=stored_size > size", "antialias=False", FOLDER),
    ("data.py", "cos * x - sin * y", "cos * x + sin * y", INPUT),
    ("data.py", "(size - sides + 1)).floor()", "(size - sides)).floor()", INPUT),
    ("data.py", ".clamp(min=0), length - 1) + start", ".clamp(min=0), length) + start", INPUT),
    ("data.py", "uniform(math.log(3 / 4), math.log(4 / 3), count, 10).exp()", "uniform(3 / 4, 4 / 3, count, 10)", INPUT),
    ("data.py", "return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)", "return batch.flip(0)", RECIPES),
    ("data.py", "rng = np.random.default_rng(100)", "rng = np.random.default_rng()", INPUT),
    ("data.py", "expand(self.batch_size - len(rows))", "expand(0)", INPUT),
    ("data.py", "self.rank * local_batch_size", "0", INPUT),
    ("data.py", "rows = self.rows[order.to(self.rows.device)]", "rows = order.to(self.rows.device)", INPUT),
    ("data.py", "checksums, self.rows[indices])", "checksums, torch.arange(len(self.stored))[indices])", INPUT),
    # pictures decoded once
    ("data.py", "return [about.st_size, about.st_mtime_ns]", "return [about.st_size, 0]", FOLDER),
    ("data.py", 'facts["written"] != when_written(path)', "False", FOLDER),
    ("data.py", 'facts.pop("hash") != _hash(facts)', 'facts.pop("hash") == 0', FOLDER),
    ("data.py", "if total >> bit & 1:", "if total >> bit & 0:", FOLDER),
    ("data.py", "shutil.rmtree(leftover, ignore_errors=True)", "pass", FOLDER),
    ("data.py", "locked = utils.lock(path, wait=True)", "raise", FOLDER),
    ("data.py", "            del images  # Windows", "            pass  # Windows", FOLDER),
    ("data.py", 'numbers.get(normalize("NFC", name))', "numbers.get(name)", FOLDER),
    ("data.py", 'for part in ("test", "val"):', 'for part in ("val",):', "tests/test_folder.py -k alone"),
    ("evaluate.py", "validated = dataset == classifier.checkpoint", "validated = False and classifier.checkpoint", "tests/test_folder.py -k alone"),
    ("data.py", "            outdated.unlink()", "            pass", FOLDER),
    ("data.py", "<= max(image.size) / 2:", "< 0:", FOLDER),
    ("data.py", "return 2 * num_bytes <= free", "return num_bytes <= free", FOLDER),
    ("data.py", "ImageOps.pad if whole else ImageOps.fit", "ImageOps.fit", FOLDER),
    ("data.py", "turn = TURNS.get(read_orientation(image))", "turn = None", FOLDER),
    ("data.py", "if -1 not in split.checksums:", "if True:", FOLDER),
    # a model that needs only torch
    ("evaluate.py", "tolerance = 1e-4 if", "tolerance = 1e4 if", CIFAR),
    ("model.py", "/ scale.clamp(min=1)", "/ scale", CIFAR),
    ("model.py", "(available - used) / 2", "0 * available", CIFAR),
    # --minutes
    ("train.py", "if passes >= least]", "if passes > least]", CLOCK),
    ("train.py", "main(begin=start_of_script)", "main()", CLOCK + " -k imports"),
    ("utils.py", "end = self.begin + self.seconds - self.closing_seconds", "end = self.begin + self.seconds", CLOCK),
    ("train.py", "or done >= run.clock.next_reading", "", CLOCK),
    ("utils.py", "self.next_reading = (done + end) / 2", "self.next_reading = done", CLOCK),
    ("utils.py", "(pace + (self.epoch_seconds or pace)) / 2", "self.epoch_seconds or pace", CLOCK),
    ("utils.py", "is_cheap = 20 * self.closing_seconds", "is_cheap = 0 * self.closing_seconds", CLOCK),
    ("utils.py", 'self.begin -= state["seconds_used"]', "pass", CLOCK),
    ("train.py", "elif epoch == 0:", "elif False:", CLOCK),
    ("train.py", "max(clock.seconds_left(), clock.head_share * left / 2, 1)", "max(clock.seconds_left(), 0.01)", CLOCK + " -k over_before_it"),
    ("utils.py", "least_steps = 150", "least_steps = 0", CLOCK),
    ("data.py", "torch.arange(args.val_images) * val_count // args.val_images", "torch.arange(args.val_images)", CLOCK + " -k fifth"),
    ("train.py", "args.val_images == 0 and most < len(val_split.labels)", "False", CLOCK),
    ("data.py", "            if self.mirrored:\n", "            if False:\n", "tests/test_data.py -k mirrored"),
    ("train.py", "(time.perf_counter() - start) / seconds)", "2 * (time.perf_counter() - start) / seconds)", CLOCK + " -k 'features_are or mirrored'"),
    ("data.py", "if index and now + (now - start) / index > self.end:", "if False:", CLOCK + " -k features_are"),
    ("train.py", "clock.head_share * left / 2, 1)", "clock.head_share * left / 2)", CLOCK + " -k before_it"),
    ("train.py", "            last_epoch = clock.trained", "            pass", CLOCK + " -k has_ended"),
    ("train.py", "middle = epoch - 1 + step / steps / 2", "middle = epoch - 0.5", CLOCK + " -k middle"),
    ("utils.py", 'may_change.remove("minutes")', "pass", CLOCK + " -k do_not_continue"),
    ("train.py", "max(run.end - args.warmup_epochs, 1e-9)", "(args.epochs - args.warmup_epochs)", CLOCK + " -k cosine_reaches"),
]  # fmt: skip


def main() -> None:
    words = sys.argv[1:] or [""]
    chosen = [fault for fault in FAULTS if any(x in fault[0] or x in fault[3] for x in words)]
    survivors, start = 0, time.perf_counter()
    for name, old, *_ in chosen:
        if (count := (ROOT / name).read_text().count(old)) != 1:
            raise SystemExit(f"{name} has {old!r} {count} times: expected once")
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
            path.write_text(source.replace(old, new))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", *shlex.split(tests)]
            options = {"cwd": folder, "capture_output": True, "text": True, "errors": "replace"}
            try:
                done = subprocess.run(command, **options, timeout=TIMEOUT, check=False)
                status, output = done.returncode, done.stdout.splitlines()
            except subprocess.TimeoutExpired:
                status, output = 1, [f"E  no end within {TIMEOUT} seconds"]
            path.write_text(source)
            if status not in (0, 1):
                raise SystemExit(done.stdout + done.stderr)
            survivors += status == 0
            verdict = "noticed " if status else "SURVIVED"
            print(f"{verdict} {name}: {old!r} -> {new!r}"[:250])
            said = [line for line in output if line.startswith(("E  ", "FAILED"))]
            for line in said[:1] + said[-1:]:  # what was not as expected, and in which test
                print(f"          {line}"[:250], flush=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(chosen) - survivors} of {len(chosen)} faults noticed in {minutes:.1f} minutes")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
