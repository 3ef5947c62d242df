"""The honest profile: the router's and the engine's own code on simulated machines, links and clocks."""
