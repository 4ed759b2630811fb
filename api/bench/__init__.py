"""Measures what people and bulk work cost each other on one engine: load, figures, verdicts, plots."""
