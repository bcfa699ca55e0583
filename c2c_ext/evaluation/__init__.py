"""Evaluation on benchmarks: every mode and its controls, intervals, paired tests, a verdict."""
