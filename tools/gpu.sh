#!/usr/bin/env bash
# Everything that needs a GPU, in under eight minutes: tests, compute-sanitizer, benchmarks.
# Needs python3 with what gpupipe needs, CuPy, pytest, pytest-timeout and hypothesis, not an installed
# gpupipe. A step that fails does not stop the next; the exit code says whether one did. Log and JSON
# go to $OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=""

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  printf '\n== %s (at most %d s): %s\n' "$name" "$limit" "$*"
  timeout --kill-after=5 "$limit" "$@" || code=$?
  [ $code -eq 0 ] || failed+=" $name"
  case $code in
    0) printf '== %s: passed in %d s\n' "$name" $((SECONDS - begin)) ;;
    124 | 137) printf '== %s: STOPPED after %d s\n' "$name" "$limit" ;;
    *) printf '== %s: FAILED with %d after %d s\n' "$name" $code $((SECONDS - begin)) ;;
  esac
}

sanitize() {
  local tool=$1
  # Allocations of their own, else an address past one is inside the allocator's block.
  step "$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
    --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider -m gpu tests/test_cuda_ops.py \
    -k "outputs_than_one_launch or (test_images_of_many_tiles and 227)"
}

everything() {
  "$python" - <<'PYTHON' || { echo "gpu: $python needs torch, CuPy and a CUDA device"; return 1; }
import cupy, platform, torch

print("python", platform.python_version(), "torch", torch.__version__, "cupy", cupy.__version__)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "CUDA", torch.version.cuda)
PYTHON
  step tests 150 "$python" -m pytest -m gpu tests
  if ! command -v compute-sanitizer >/dev/null; then
    printf '\n== compute-sanitizer is not installed: memcheck and racecheck are left out\n'
  elif ! timeout 30 compute-sanitizer "$python" -c "import cupy; cupy.zeros(1)" >/dev/null 2>&1; then
    printf '\n== compute-sanitizer does not work on this device: memcheck and racecheck are left out\n'
  else
    sanitize memcheck
    sanitize racecheck
  fi
  step normalize 90 "$python" -m benchmarks.bench_normalize_cuda --json "$out/normalize_cuda.json"
  step loader 60 "$python" -m benchmarks.bench_loader --device cuda --json "$out/loader_cuda.json" \
    --only fashion cifar imagenet overhead --rounds 5 --seconds 0.1  # 11 of 0.4 s take minutes
  printf '\n== %s\n' "$([ -z "$failed" ] && echo everything passed || echo "failed:$failed")"
  [ -z "$failed" ]
}

everything 2>&1 | tee "$out/gpu.log"
