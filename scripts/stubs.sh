#!/usr/bin/env bash
# Generates baton/v1 from proto/. `stubs.sh` writes, `stubs.sh check` fails if what is committed is stale.
#
# The generator has its own environment: grpcio-tools 1.76 needs protobuf < 7, the rest of the tree runs on newer ones.
# Its versions are pinned because its output is committed and compared byte for byte.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=("grpcio-tools==1.76.0" "mypy-protobuf==5.1.0" "protobuf==6.33.6" "setuptools<81")
venv=".venv/proto"
stamp="$venv/.stamp"

if [[ ! -f "$stamp" || "$(cat "$stamp")" != "${tools[*]}" ]]; then
  echo "making $venv (${tools[*]})"
  rm -rf "$venv"
  .venv/bin/python -m venv --without-pip "$venv"
  .venv/bin/python -m pip --python "$venv/bin/python" install -qq "${tools[@]}"
  echo "${tools[*]}" >"$stamp"
fi

generate() {
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I proto \
    --python_out="$1" --grpc_python_out="$1" --mypy_out="quiet:$1" --mypy_grpc_out="quiet:$1" proto/baton/v1/*.proto
}

if [[ "${1:-}" == check ]]; then
  fresh="$(mktemp -d)"
  trap 'rm -rf "$fresh"' EXIT
  generate "$fresh"
  if ! diff -r --brief --exclude=__init__.py --exclude=__pycache__ "$fresh/baton/v1" baton/v1; then
    echo "baton/v1 is not what proto/ generates: run 'make proto' and commit the result" >&2
    exit 1
  fi
  echo "baton/v1 is what proto/ generates"
else
  generate .
fi
