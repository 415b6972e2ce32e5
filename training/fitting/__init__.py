"""Fitting an estimator to outcome tables: cross-fitting and calibration."""
