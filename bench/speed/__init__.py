"""Benchmarks that asv runs: ours over a reference, side by side, lower is better."""
