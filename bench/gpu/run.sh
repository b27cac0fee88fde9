#!/usr/bin/env bash
# On the machine with the GPU: take in what pack.py wrote, then measure. Files to take home lie in $OUT.
#   bench/gpu/run.sh receive PART ...     keep these parts (they may come one call after another)
#   bench/gpu/run.sh check                do the tests and the small suite pass here
#   bench/gpu/run.sh speed                seconds of an epoch, plain and graphed
#   bench/gpu/run.sh measure SECONDS      the suite that wants a GPU, within so many seconds
#   bench/gpu/run.sh timings              latency and memory of what it found
#   bench/gpu/run.sh operations           latency of networks by budget; what asv measures
#   bench/gpu/run.sh slot SECONDS         cells, the latency figure and timings in one call, each for as long as there is time
set -euo pipefail
cd "$(dirname "$0")/../.."
here=${WIDTHBENCH_GPU:-/tmp/widthbench-gpu}
out=${OUT:-$here/out}
mkdir -p "$here" "$out"
suite=${SUITE:-merging-cifar10}
commit=$(cat "$here/parts/COMMIT" 2>/dev/null || echo none)
site=$here/site-$commit # what is mended, packed and received again must not run as it was
export PYTHONPATH=$site PYTHONUNBUFFERED=1 WIDTHBENCH_CACHE=$here/cache WIDTHBENCH_DATA=$here/data OMP_NUM_THREADS=1
export WIDTHBENCH_COMMIT=$commit
python=${PYTHON:-python3}

install() {
  [ -d "$site" ] || $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$here"/parts/wheels/*.whl
  $python - <<'PY' # every package that ours needs, by name
import re, sys
from importlib.metadata import PackageNotFoundError, requires, version
lacking = []
for needed in requires("widthbench") or []:
    name = re.match(r"[\w.-]+", needed).group()
    try:
        "extra ==" in needed or version(name)
    except PackageNotFoundError:
        lacking.append(name)
if lacking:
    sys.exit(f"this machine lacks {', '.join(lacking)}: name them in pack.py --need")
PY
}

unpack() {
  for tar in train test; do
    if [ ! -s "$here/data/cifar10/$tar.tar" ] && ls "$here/parts/$tar.tar.xz."* >/dev/null 2>&1; then
      mkdir -p "$here/data/cifar10"
      cat "$here/parts/$tar.tar.xz."* | xz -dc >"$here/part.tar" && mv "$here/part.tar" "$here/data/cifar10/$tar.tar"
    fi
  done
  [ ! -d "$here/data/cifar10" ] || $python -c 'from widthbench.data import sources; sources.load("cifar10")' # decoded once, for all workers
}

# NVIDIA's service for processes that share a card: without it they take turns, and small kernels leave most of it idle.
# A process of this user, no setting of the card; where it does not work they take turns.
share() {
  local control=/usr/local/nvidia/bin/nvidia-cuda-mps-control
  [ -x "$control" ] || control=$(command -v nvidia-cuda-mps-control) || { echo "processes take turns on the card: no MPS here"; return 0; }
  export CUDA_MPS_PIPE_DIRECTORY=$here/mps CUDA_MPS_LOG_DIRECTORY=$here/mps
  mkdir -p "$here/mps"
  if timeout 20 "$control" -d && timeout 40 $python -c 'import torch; print(torch.ones(2, device="cuda").sum().item(), "by MPS")'; then
    mps=$control
  else
    echo "processes take turns on the card: MPS does not answer"
    alone
  fi
}
alone() {
  [ -z "${mps:-}" ] || echo quit | timeout 20 "$mps" || true
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

bring() {
  cp "$here/results/$suite/records.jsonl" "$here/results/$suite/timings.jsonl" "$out/" 2>/dev/null || true
  [ ! -d "$here/cache/bases" ] || tar -C "$here/cache" -cf "$out/bases.tar" --exclude='*.lock' bases
}

case ${1:-} in
receive)
  mkdir -p "$here/parts"
  for part in "${@:2}"; do
    [ ! -d "$part/wheels" ] || rm -rf "$here/parts/wheels" # of an earlier commit
    cp -r "$part"/. "$here/parts/"
  done
  du -sh "$here/parts"
  ;;
check)
  install
  nvidia-smi || true
  $python -c 'import sys, torch, timm, torchvision; print(sys.version, torch.__version__, timm.__version__, torchvision.__version__)'
  cd "$here" && repo=$OLDPWD
  failed=0
  $python -m pytest -q -p no:cacheprovider --rootdir "$repo" -c "$repo/pyproject.toml" "$repo/tests/test_cuda.py" --durations=8 2>&1 | tee "$out/tests.txt" || failed=1
  $python -m widthbench run smoke --jobs 4 --results "$here/results" --no-timing 2>&1 | tail -40 || failed=1
  exit $failed
  ;;
measure)
  install
  unpack
  cd "$here" && repo=$OLDPWD
  trap bring EXIT
  (( $2 > 120 )) || { echo "measure: $2 s are too few; a minute of them is for the report" >&2; exit 2; }
  # SECONDS are the whole step's: a report comes at their end; a record is a file of the cache as soon as its cell is done
  $python -m widthbench run "$suite" --only ${ONLY:-vgg mobilenet} --order seed --jobs ${JOBS:-4} --within $(( $2 - 60 )) --no-timing --results "$here/results" 2>&1 | tail -220 || true # 1: cells failed
  ;;
timings)
  install
  cd "$here" && repo=$OLDPWD
  trap bring EXIT
  $python -m widthbench report "$suite" --results "$here/results" | tail -60 || true # 1: cells failed
  ;;
speed)
  install
  $python bench/gpu/speed.py --write "$out/speed.jsonl"
  ;;
slot)
  begin=$SECONDS
  left() { echo $(($2 - (SECONDS - begin) - $1)); }
  (( $2 > 240 )) || { echo "slot: $2 s are too few: 130 of them are for what follows the cells" >&2; exit 2; }
  install
  cd "$here" && repo=$OLDPWD
  trap bring EXIT
  unpack
  share
  echo "cells begin after $((SECONDS - begin)) s"
  cells=$(left 130 "$2")
  $python -m widthbench run "$suite" --only ${ONLY:-vgg mobilenet} --order seed --jobs ${JOBS:-10} --within "$cells" --no-timing --results "$here/results" >"$out/log.txt" 2>&1 &
  run=$!
  while kill -0 $run 2>/dev/null && (( $(left 124 "$2") > 0 )); do sleep 1; done # 6 s more: its workers are gone, it writes the report
  alone
  echo "latency begins after $((SECONDS - begin)) s"
  timeout "$(left 15 "$2")" $python "$repo/bench/studies/latency.py" --device cuda --write "$out/latency-cuda" || true
  while kill -0 $run 2>/dev/null && (( $(left 10 "$2") > 0 )); do sleep 1; done
  bring
  tail -40 "$out/log.txt"
  (( $(left 25 "$2") <= 0 )) || timeout "$(left 5 "$2")" $python -m widthbench report "$suite" --results "$here/results" >>"$out/log.txt" 2>&1 || true
  echo "over after $((SECONDS - begin)) s"
  ;;
operations)
  install
  cd "$here" && repo=$OLDPWD
  $python "$repo/bench/studies/latency.py" --device cuda --write "$out/latency-cuda"
  PYTHONPATH=$PYTHONPATH:$repo/bench $python - <<'PY' >"$out/operations.json"
import json
from speed.measuring import items, measured
print(json.dumps(measured(items("cuda")), indent=1))
PY
  cat "$out/operations.json"
  ;;
*)
  sed -n 2,10p "$0"
  exit 2
  ;;
esac
