#!/usr/bin/env bash
# Runs the commands that README.md shows; `make example` keeps what they print in docs/example.txt.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export COLUMNS=100

show() {
    echo "\$ $1"
    bash -c "$1 --quiet" | sed -e "s#$folder/##g" # as a reader's own folder would look
    echo
}

show "prunus prune smollm2 out --samples 16"
show "prunus evaluate out --baseline smollm2 --windows 8 --sample 'The capital of France is'"
show "prunus inspect out" | sed -e '10,$d'
echo "  ..."
