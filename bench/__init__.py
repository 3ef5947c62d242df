"""Measures Baton beside its peers and limits. Imports anything; nothing imports it."""
