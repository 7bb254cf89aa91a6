#!/usr/bin/env bash
# Print the interpreters that this machine has for Mainstay, oldest first, one a line: those on PATH that run, and those
# that pyenv keeps. A shim of pyenv stands on PATH for every version and runs only the selected one, so each is tried.
set -euo pipefail
for minor in 11 12 13 14; do
  name=python3.$minor
  for candidate in "$(command -v "$name" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/"$name"; do
    if [ -n "$candidate" ] && "$candidate" -c 'import venv' 2> /dev/null; then
      echo "$candidate"
      break
    fi
  done
done
