"""Compares ways of serving on this machine under load: ``python -m bench serve SCENARIO``."""
