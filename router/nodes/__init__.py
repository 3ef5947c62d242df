"""The connections to nodes: finds them, opens sessions, sends and takes their messages."""
