"""The transfer protocol as pure machines: events and the time in, actions out."""
