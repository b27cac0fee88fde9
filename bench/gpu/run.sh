#!/usr/bin/env bash
# On the machine with the GPU: take in what pack.py wrote, then measure. Files to take home lie in $OUT.
#   bench/gpu/run.sh receive PART ...     keep these parts (they may come one call after another)
#   bench/gpu/run.sh check                do the tests and the small suite pass here
#   bench/gpu/run.sh speed                seconds of an epoch, plain and graphed
#   bench/gpu/run.sh measure SECONDS      the suite that wants a GPU, within so many seconds
#   bench/gpu/run.sh timings              latency and memory of what it found
#   bench/gpu/run.sh operations           latency of networks by budget; what asv measures
set -euo pipefail
cd "$(dirname "$0")/../.."
here=${WIDTHBENCH_GPU:-/tmp/widthbench-gpu}
out=${OUT:-$here/out}
mkdir -p "$here" "$out"
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
  for tar in train test; do
    if [ ! -s "$here/data/cifar10/$tar.tar" ] && ls "$here/parts/$tar.tar.xz."* >/dev/null 2>&1; then
      mkdir -p "$here/data/cifar10"
      cat "$here/parts/$tar.tar.xz."* | xz -dc >"$here/part.tar" && mv "$here/part.tar" "$here/data/cifar10/$tar.tar"
    fi
  done
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
  cd "$here" && repo=$OLDPWD
  suite=${SUITE:-merging-cifar10}
  bring() { cp "$here/results/$suite/records.jsonl" "$here/results/$suite/timings.jsonl" "$out/" 2>/dev/null || true; }
  trap bring EXIT
  (( $2 > 120 )) || { echo "measure: $2 s are too few; a minute of them is for the report" >&2; exit 2; }
  # SECONDS are the whole step's: a report comes at their end; a record is a file of the cache as soon as its cell is done
  $python -m widthbench run "$suite" --only ${ONLY:-vgg mobilenet} --order seed --jobs ${JOBS:-4} --within $(( $2 - 60 )) --no-timing --results "$here/results" 2>&1 | tail -220 || true # 1: cells failed
  ;;
timings)
  install
  cd "$here" && repo=$OLDPWD
  suite=${SUITE:-merging-cifar10}
  trap 'cp "$here/results/$suite/records.jsonl" "$here/results/$suite/timings.jsonl" "$out/" 2>/dev/null || true' EXIT
  $python -m widthbench report "$suite" --results "$here/results" | tail -60 || true # 1: cells failed
  ;;
speed)
  install
  $python bench/gpu/speed.py --write "$out/speed.jsonl"
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
  sed -n 2,9p "$0"
  exit 2
  ;;
esac
