#!/usr/bin/env bash
# Runs the tests of a package's users with the oldest and the newest version that pyproject.toml allows. The version that
# .venv has is left out: the suite runs with it. Each other one lies in a folder of its own, .venv/bounds/NAME-VERSION.
#
#   bash scripts/bounds.sh llvmlite   the kernels for processors
#   bash scripts/bounds.sh triton     launches of the kernels for GPUs, and their compilation (a download of 190 MB)
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

case "${1:-}" in
  # What LLVM compiles, on the host's vectors and on others: a part of the tests, for CI's time.
  llvmlite) tests=(tests/kernels/test_cpu_{kernels,int8,long}.py -k "not narrow and not float16 and not heads") ;;
  triton) tests=(tests/kernels/test_triton_launch.py tests/unit/bench/test_aot.py) ;;
  *) echo "usage: scripts/bounds.sh llvmlite|triton; got '${*:-nothing}'" >&2; exit 2 ;;
esac
name="$1"

# "name>=1.2,<1.9" as it stands in pyproject.toml, without markers.
allowed="$("$python" - "$name" <<'PY'
import re, sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
(found,) = {r for rs in extras.values() for r in rs if re.match(rf"{sys.argv[1]}\b", r)}
print(found.split(";")[0].strip())
PY
)"
oldest="$(sed -E 's/.*>=([0-9.]+).*/\1/' <<<"$allowed")"

version_in() { PYTHONPATH="$1" "$python" -c "from importlib.metadata import version; print(version('$name'))"; }

installed="$(version_in "")"
for wanted in "$name==$oldest" "$allowed"; do
  folder=".venv/bounds/${wanted//[^a-z0-9.]/-}"
  if [[ ! -d "$folder" ]]; then
    rm -rf "$folder.part"
    # No wheel for this Python, or no network.
    if ! "$python" -m pip install -qq --no-deps --only-binary ":all:" --target "$folder.part" "$wanted"; then
      echo "$wanted could not be installed: the tests were NOT run with it" >&2
      continue
    fi
    mv "$folder.part" "$folder"
  fi
  version="$(version_in "$PWD/$folder")"
  if [[ "$version" == "$installed" ]]; then
    echo "$name $version is the installed one: the suite runs with it"
    continue
  fi
  echo "==> $name $version: ${tests[*]}"
  PYTHONPATH="$PWD/$folder:$PWD" "$python" -m pytest -q -m "not long" "${tests[@]}"
done
