"""Measure. Imports anything; nothing imports it."""
