#!/usr/bin/env bash
# What to measure in the first hour on a GPU, part by part; each run writes a log as it goes.
#
#     bash tests/measure_gpu.sh WEIGHTS OUT [PART ...]
#
# WEIGHTS is the file or name of the weights; CIFAR-100 is in data/. Parts, all of them by default:
#     speed    benchmark.py in fp16 and bf16, compiled too                            8 minutes
#     default  the default recipe with three seeds, and its test accuracy            16 minutes
#     minutes  --minutes 3 and 10, and their test accuracy                           14 minutes
#     lines    settings of --minutes on the hold-out, in runs of three minutes       30 minutes
#     tests    python -m pytest -m gpu                                                5 minutes
# A run that has finished is not repeated: after an interruption, the same command goes on.
# With REHEARSAL=1 everything is tiny and runs on the CPU: it shows that the script works.
set -uo pipefail
cd "$(dirname "$0")/.."

weights=$1 out=$2
shift 2
parts=${*:-speed default minutes lines tests}
short=${REHEARSAL:+--device cpu --architecture resnet18 --precision fp32 --no-curves
    --train-per-class 4 --holdout-per-class 2 --image-size 32 --epochs 1}
scale=${REHEARSAL:+0.1}  # of all times in minutes
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | tee "$out/gpu.txt"
git log -1 --format=%h 2>/dev/null | tee "$out/commit.txt"

# run NAME COMMAND...: into OUT/NAME.log, once
run() {
    local name=$1
    shift
    if [ -f "$out/$name.done" ]; then return; fi
    echo "$(date +%H:%M:%S)  $name: $*"
    if "$@" >"$out/$name.log" 2>&1; then touch "$out/$name.done"; else echo "$name failed"; fi
    tail -n 3 "$out/$name.log"
}

# learn NAME FLAGS...: trains, and evaluates without and with --tta
learn() {
    local name=$1 best="$out/$1/best.pt"
    shift
    # shellcheck disable=SC2086
    run "$name" python train.py --weights "$weights" --checkpoint-dir "$out/$name" $short "$@"
    local evaluate=(python evaluate.py --checkpoint "$best" ${REHEARSAL:+--device cpu})
    run "$name-test" "${evaluate[@]}" --results-dir "$out/$name-results"
    run "$name-tta" "${evaluate[@]}" --results-dir "$out/$name-tta-results" --tta
}

minutes() { awk -v n="$1" -v scale="${scale:-1}" 'BEGIN { print n * scale }'; }

for part in $parts; do
    case $part in
    speed)
        for precision in fp16 bf16; do
            run "speed-$precision" python tests/benchmark.py --precision "$precision" --compile \
                --budget-minutes "$(minutes 4)" --json "$out/speed-$precision.json" \
                ${REHEARSAL:+--device cpu --image-size 32 --batch-size 4 --steps 1 --precision fp32}
        done
        ;;
    default)
        for seed in 0 1 2; do learn "default-$seed" --seed "$seed"; done
        ;;
    minutes)
        for n in 3 10; do learn "minutes-$n" --minutes "$(minutes "$n")"; done
        ;;
    lines)
        # accuracy on the hold-out is in the last lines of each log
        hold="--minutes $(minutes 3) --holdout-per-class 50"
        while read -r name flags; do
            # shellcheck disable=SC2086
            run "$name" python train.py --weights "$weights" --checkpoint-dir "$out/$name" \
                $hold $flags $short
        done <<-END
			line-224
			line-192 --image-size 192
			line-160 --image-size 160
			line-rate-2 --learning-rate 0.01
			line-rate-half --learning-rate 0.0025
			line-ema --ema-decay 0.999
			line-smoothing --label-smoothing 0.1
			line-mixing --mixup 0.2 --cutmix 1
			line-scale --random-scale 0.3
		END
        ;;
    tests)
        run gpu-tests python -m pytest ${REHEARSAL:+--collect-only -q} -m gpu
        ;;
    *)
        echo "unknown part $part" >&2
        exit 2
        ;;
    esac
done
grep -h -E "^(best|top-1|finished|chosen)" "$out"/*.log
