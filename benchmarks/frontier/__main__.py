"""Run the trainings of the frontier, or time their steps."""

from benchmarks.frontier.run import main

if __name__ == "__main__":
    main()
