"""The benchmarks: agx, its peer and the physical limit, measured in one run (issue 5). `python -m benchmarks`."""
