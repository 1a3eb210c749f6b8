"""Workloads, runs, reports."""
