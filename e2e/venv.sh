#!/usr/bin/env bash
# Makes the Python environment with moto, boto3 and the aws command line, as pinned in requirements.txt, in the
# directory named by the first argument. What is current already is left alone.
#
#   venv.sh DIR
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: venv.sh DIR}
cmp -s "$here/requirements.txt" "$out/.installed" && exit 0

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "aws tools: Python 3.11 or newer is needed for moto and the aws command line; install it and start again" >&2
    exit 1
fi
mkdir -p "$out"
exec 9>"$out/.lock"
flock 9
cmp -s "$here/requirements.txt" "$out/.installed" && exit 0
echo "aws tools: installing moto, boto3 and the aws command line (about 1 min, once)" >&2
started=$SECONDS
if ! { python3 -m venv "$out" && "$out/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"; } >"$out/.log" 2>&1; then
    tail -n 15 "$out/.log" >&2
    echo "aws tools: the installation failed (the whole output: $out/.log); check that the Python package index can be reached, then start again" >&2
    exit 1
fi
cp "$here/requirements.txt" "$out/.installed"
echo "aws tools: ready after $((SECONDS - started)) s" >&2
