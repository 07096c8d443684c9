#!/usr/bin/env python3
"""Runs the test programs that `cargo test --no-run --message-format=json` has named on standard input, two at a time.

They mostly wait for servers, so two of them take little more time than one. Each has directories, ports and accounts of its
own. What a program prints is kept, and shown if it fails; all of them run to their end. The last lines say what failed, for who
sees no others.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The longest first, so that none of them is left for the end.
FIRST = ["operations", "targets", "crash", "network", "admission", "install"]
BESIDE = 2
# How much of what a test said at its end is said again.
SAID = 24


def programs(lines):
    """Name, path and package directory of every test program."""
    for line in lines:
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message.get("executable"):
            if "test" in message["target"]["kind"]:
                yield message["target"]["name"], message["executable"], Path(message["manifest_path"]).parent


def run(program):
    """Runs one and says how it went; what it said of the tests that failed, if any did."""
    name, path, directory = program
    begun = time.monotonic()
    environment = {**os.environ, "CARGO_MANIFEST_DIR": str(directory)}
    done = subprocess.run([path], cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = done.stdout.decode(errors="replace")
    results = [line for line in text.splitlines() if line.startswith("test result: ")]
    said = results[-1].removeprefix("test result: ").split("; finished")[0] if results else f"exit code {done.returncode}"
    if done.returncode:
        print(text, flush=True)
    print(f"   {name}: {said}, {time.monotonic() - begun:.0f} s", flush=True)
    return name, failures(text) if done.returncode else None


def failures(text):
    """The first lines of what each failed test has said."""
    out, left = [], 0
    for line in text.splitlines():
        if line.startswith("---- ") and line.endswith(" stdout ----"):
            left = SAID
        elif line == "failures:":
            left = 0
        if left and line:
            out.append(line[:400])
            left -= 1
    return out or text.splitlines()[-SAID:]


def main():
    """Fails when one of them has failed, or when there is none."""
    found = sorted(programs(sys.stdin), key=lambda program: [*FIRST, program[0]].index(program[0]))
    with ThreadPoolExecutor(BESIDE) as pool:
        failed = {name: said for name, said in pool.map(run, found) if said}
    for said in failed.values():
        print("\n".join(said), flush=True)
    if failed or not found:
        sys.exit(f"error: failed test programs: {', '.join(failed) or 'there is none'}")


main()
