"""Baton: disaggregated serving of large language models. This package is what every process and client shares."""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
