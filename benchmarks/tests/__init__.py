"""Tests of the comparisons and the report."""
