#!/usr/bin/env bash
# Make an environment with pip in it: `bash tools/venv.sh python3 .venv`. On Debian python3 comes without what puts pip
# there, and then leaves one without it, which is completed here too.
set -euo pipefail
python=$1
place=$2
if "$place/bin/python" -m pip --version > /dev/null 2>&1; then
  exit
fi
if ! "$python" -c 'import ensurepip' 2> /dev/null; then
  package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "$python cannot make virtual environments; on Debian and Ubuntu: sudo apt-get install -y $package" >&2
    exit 1
  fi
  echo "$python cannot make virtual environments; installing Debian's $package once" >&2
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" > /dev/null
fi
"$python" -m venv "$place"
