"""Measuring routing: metrics, intervals, off-policy estimates, risk control, reports."""
