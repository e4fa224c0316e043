#!/usr/bin/env bash
# Test and measure on one NVIDIA GPU, what matters most first, in at most 12 minutes:
#
#     bash .ci/gpu.sh                   # tests decode train peers shakespeare
#     bash .ci/gpu.sh tests decode      # these steps alone
#
# The folder $OUT (out-gpu) gets a text file for each step, and summary.txt, which says how each ended.
# $PYTHON (python3) has torch and requirements-dev.txt. $SHAKESPEARE is the text where there is no network.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
all="tests decode train peers shakespeare"
chosen=${*:-$all}
for name in $chosen; do
    case " $all " in
        *" $name "*) ;;
        *) echo "gpu.sh: there is no step $name; there are $all" >&2; exit 2 ;;
    esac
done
mkdir -p "${OUT:-out-gpu}"
out=$(cd "${OUT:-out-gpu}" && pwd)
run=$(mktemp -d)  # for data and checkpoints
trap 'rm -rf "$run"' EXIT
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10

say() {
    echo "$*" | tee -a "$out/summary.txt"
}

# step NAME SECONDS COMMAND: run a chosen step. SIGINT ends it at its limit, on which scripts report.
step() {
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    case " $chosen " in
        *" $name "*) ;;
        *) return ;;
    esac
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >> "$out/$name.txt" 2>&1
    local status=$?
    say "$name: exit status $status after $((SECONDS - began)) of $seconds s (${*: -3})"  # 124: its limit
}

say "$(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2> /dev/null)"
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1)"
say "$($python -c 'import torch; print("torch", torch.__version__)')"

workers=
if $python -c 'import xdist' 2> /dev/null; then workers="-n 4"; fi  # most of their time they compile
step tests 240 $python -m pytest -q $workers --tb=short --show-capture=no --durations=20 \
    test_model.py -k on_gpu

step decode 80 $python .ci/gpu.py decode ours config/gpt_oss_20b.py
step decode 80 $python .ci/gpu.py decode packed config/gpt_oss_20b.py

step train 80 $python .ci/gpu.py train ours config/gpt_oss_500m.py
step train 40 $python .ci/gpu.py train fused config/gpt_oss_500m.py

step peers 50 $python .ci/gpu.py decode GptOss config/gpt_oss_20b.py
step peers 50 $python .ci/gpu.py train GptOss config/gpt_oss_500m.py

text=${SHAKESPEARE:-../shared/data/tinyshakespeare.txt}
if [ -f "$text" ]; then text="--dataset=$text"; else text=; fi
step shakespeare 20 $python prepare.py config/shakespeare_char.py --data_dir="$run/data" $text
step shakespeare 80 $python train.py config/shakespeare_char.py --data_dir="$run/data" --out_dir="$run/out" \
    --sample_tokens=0

say "$SECONDS s in all"
