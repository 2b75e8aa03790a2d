"""A long run as a script: how much of it, from which seed, and one line of JSON at its end."""

import argparse
import json
import logging
import random
import sys


def main(about, counted, run):
    """Run ``run(count, seed) -> report``; exits with 1 if its report has problems."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument(f"--{counted}", dest="count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    given = parser.parse_args()
    logging.disable()
    report = run(given.count, given.seed)
    print(json.dumps(report), flush=True)
    sys.exit(bool(report["problems"]))
