"""Renders the records of a run as paper-style tables. It knows records only: no torch, no methods, no benchmarks."""
