#!/usr/bin/env bash
# Lints proto/ and compares it with an earlier state: what old clients and nodes rely on must not go. buf.yaml has the rules.
#
#   BASE=v1.2   compare with this commit   (default: the newest tag, else origin/main, else main, else HEAD)
set -euo pipefail
cd "$(dirname "$0")/.."

# One of the system, or else one in .venv: the wheel brings the program and nothing else.
PATH="$PATH:$PWD/.venv/bin"
if ! command -v buf >/dev/null &&
  ! { [[ -x .venv/bin/python ]] && .venv/bin/python -m pip install -qq --only-binary ":all:" "buf-bin==1.75.0" 2>/dev/null; }; then
  echo "buf could not be installed: proto/ was NOT linted nor compared with its past (pip install buf-bin)"
  exit 0
fi

find_base() {
  local ref
  for ref in ${BASE:-"$(git describe --tags --abbrev=0 2>/dev/null || true)" origin/main main HEAD}; do
    if git rev-parse --verify --quiet "$ref^{commit}" >/dev/null; then
      echo "$ref"
      return
    fi
  done
  echo "no commit to compare with: BASE is '${BASE:-}', and this is ${PWD}" >&2
  return 1
}

buf lint
base="$(find_base)"
before="$(mktemp -d)"
trap 'rm -rf "$before"' EXIT
# The files themselves, as buf's own way of reading git needs a buf.yaml in the old commit and a repository that is no worktree.
git archive "$base" proto | tar -x -C "$before"
buf breaking proto --against "$before/proto" || {
  echo "proto/ breaks what $base has: keep fields and numbers, reserve those that go" >&2
  exit 1
}
echo "proto/ is clean and breaks nothing of $base ($(git rev-parse --short "$base"))"
