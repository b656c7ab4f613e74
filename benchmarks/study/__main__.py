"""Run ``python -m benchmarks.study``; see ``benchmarks.study.run``."""

from benchmarks.study.run import parse, run

if __name__ == "__main__":
    run(parse())
