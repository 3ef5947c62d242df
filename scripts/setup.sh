#!/usr/bin/env bash
# Makes .venv ready for every verb of the Makefile. Does nothing, in milliseconds, if nothing changed since the last time.
#
#   PYTHON=python3.12   use this interpreter       (default: the first of python3, python3.13 ... that is 3.11 to 3.14)
#   CUDA=1 | CUDA=0     which build of torch       (default: CUDA if nvidia-smi lists a GPU, else CPU)
set -euo pipefail
cd "$(dirname "$0")/.."

torch="torch==2.13.0"
cpu_index="https://download.pytorch.org/whl/cpu"
venv=".venv"
stamp="$venv/.setup-stamp"
log="$venv/setup.log"

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'setup: %s\n' "$@" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.11 to 3.14 found (looked for: ${PYTHON:-python3, python3.11 to python3.14, python})." \
    "Debian and Ubuntu: sudo apt-get install python3 python3-venv; or name one: make setup PYTHON=/path/to/python3.12"
}

wants_cuda() {
  case "${CUDA:-auto}" in
    1) return 0 ;;
    0) return 1 ;;
    auto) nvidia-smi -L 2>/dev/null | grep -q '^GPU' ;;
    *) die "CUDA is '${CUDA}', expected 0, 1 or nothing" ;;
  esac
}

# True unless .venv is missing, broken, or made by another interpreter than the one asked for.
is_usable() {
  local base='import sys; print(sys.base_prefix, sys.version)'
  [[ -x "$venv/bin/python" ]] && "$venv/bin/python" -c "" 2>/dev/null &&
    { [[ -z "${PYTHON:-}" ]] || [[ "$("$PYTHON" -c "$base")" == "$("$venv/bin/python" -c "$base")" ]]; }
}

make_venv() {
  local python="$1"
  rm -rf "$venv"
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$venv"
  elif "$python" -m pip --python "$python" --version >/dev/null 2>&1; then
    # Debian without python3-venv but with python3-pip: that pip can fill an empty environment.
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install -qq pip
  else
    die "$python cannot make virtual environments: its ensurepip module is missing." \
      "Debian and Ubuntu: sudo apt-get install python3-venv"
  fi
}

# pip's own output goes to the log; here one moving line on a terminal, or a line every ten seconds elsewhere.
progress() {
  local line last=$SECONDS
  while IFS= read -r line; do
    case "$line" in Collecting* | *Downloading* | Processing* | Building* | Installing*) ;; *) continue ;; esac
    if [[ -t 1 ]]; then
      printf '\r\033[K    %.90s' "$line"
    elif ((SECONDS - last >= 10)); then
      printf '    %.90s\n' "$line"
      last=$SECONDS
    fi
  done
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
}

install() {
  "$venv/bin/python" -m pip install "$@" 2>&1 | tee -a "$log" | progress
}

# On Linux the plain wheel brings gigabytes of CUDA, so ask for the CPU build by name: first from the sources pip is
# configured with (a mirror, a folder of wheels), then from PyTorch's own index, which is asked for torch alone.
install_cpu_torch() {
  local cpu_build=(--only-binary ":all:" "$torch+cpu")
  if [[ "$(uname -s)" != Linux ]]; then
    install "$torch"
  elif ! install "${cpu_build[@]}" && ! install --extra-index-url "$cpu_index" "${cpu_build[@]}"; then
    say "no CPU build of $torch to be had: installing the plain one, which may be gigabytes larger"
    install "$torch"
  fi
}

flavor=cpu
if wants_cuda; then flavor=cuda; fi
wanted="$(cat pyproject.toml "$0" | sha256sum | cut -c 1-64) $flavor"
if ! is_usable; then rm -f "$stamp"; fi
if [[ -x "$venv/bin/python" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
  exit 0
fi

started=$SECONDS
if ! is_usable; then
  python="$(find_python)"
  say "making $venv with $("$python" --version) ($python)"
  make_venv "$python"
fi
rm -f "$stamp" "$log"
trap 'printf "setup failed; the last lines of %s:\n" "$log" >&2; tail -n 15 "$log" >&2' ERR
set -E
say "installing $torch ($flavor)"
if [[ $flavor == cuda ]]; then install "$torch"; else install_cpu_torch; fi
say "installing Baton and what it needs"
# "compat": one path entry instead of a list of packages, so that a new package needs no new setup.
install --editable ".[dev]" --config-settings editable_mode=compat
trap - ERR
echo "$wanted" >"$stamp"
say "ready in $((SECONDS - started)) s"
