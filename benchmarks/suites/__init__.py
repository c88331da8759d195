"""Suites for asv, airspeed velocity: each verifies what it measures, then times it. See benchmarks/README.md."""
