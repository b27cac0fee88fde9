#!/usr/bin/env bash
# The whole way of bench/gpu on a machine without a GPU: an empty Python with what the lent machine has, pack, run, merge; with times.
#   bench/gpu/rehearse.sh DIR [SECONDS]     DIR is made anew; SECONDS of "measure" (600)
# PYTHON (python3.12) makes the environment. SUITE and ONLY choose what is measured, by CIFAR-10 alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=$(realpath -m "$1") seconds=${2:-600}
export SUITE=${SUITE:-cifar10-small} ONLY=${ONLY:-mobilenetv1_025_cifar-base-s0 mobilenetv1_025_cifar-l1-norm-macs:0.5-s0} JOBS=1
# what there is of ours on the machine (torch of its own CUDA version, and none of the packages in pack.py's NEED)
there="torch==2.11.* torchvision timm scikit-learn scipy numpy matplotlib tabulate jinja2 safetensors accelerate filelock cloudpickle
  fsspec psutil threadpoolctl tqdm pytest pytest-xdist typing-extensions"

step() {
  local begin=$SECONDS
  "${@:2}" >>"$dir/log" 2>&1 || { echo "$1 failed: see $dir/log" >&2; exit 1; }
  printf '| %s | %d |\n' "$1" $((SECONDS - begin)) | tee -a "$dir/times.md"
}
machine() { "${PYTHON:-python3.12}" -m venv "$dir/venv" && "$dir/venv/bin/pip" install -q $there; }
travel() { mkdir -p "$dir/tree" && git archive HEAD -- . ':!results' | tar -x -C "$dir/tree"; }
there() { (cd "$dir/tree" && env -u WIDTHBENCH_DATA -u WIDTHBENCH_WEIGHTS PYTHON="$dir/venv/bin/python" WIDTHBENCH_GPU="$dir/gpu" OUT="$dir/out" bench/gpu/run.sh "$@"); }
merge() {
  mkdir -p "$dir/home" && cp -r "results/published/$SUITE" "$dir/home/" 2>/dev/null || true
  python -m widthbench report "$SUITE" --results "$dir/home" --add "$dir/out/records.jsonl" --no-timing || [ $? = 1 ]
  grep -q 'l1-norm' "$dir/home/$SUITE/leaderboard.md"
}

rm -rf "$dir" && mkdir -p "$dir"
printf '| step | seconds |\n|:-----|--------:|\n' | tee "$dir/times.md"
step "the machine: Python and torch" machine
step "pack.py" python bench/gpu/pack.py "$dir/parts"
step "the working tree travels" travel
for part in "$dir"/parts/*; do step "run.sh receive $(basename "$part")" there receive "$part"; done
step "run.sh check" there check
step "run.sh measure $seconds" there measure "$seconds"
step "report --add" merge
"$dir/venv/bin/python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")'
