#!/usr/bin/env bash
# Clone what is committed into a new directory and run there what the README's first screen says.
set -euo pipefail
root=$(git rev-parse --show-toplevel)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git clone --quiet "$root" "$scratch/mainstay"
cd "$scratch/mainstay"
# Nothing of the caller's environment may lead back into the caller's checkout.
unset VIRTUAL_ENV PYTHONPATH MAKEFLAGS MAKELEVEL
for command in "make demo" "make demo ENGINE=full" "make test"; do
  echo "== $command (in a fresh clone)"
  $command
done
if [ -n "$(git status --porcelain)" ]; then
  echo "the commands left files behind that git does not ignore:"
  git status --short
  exit 1
fi
