"""One worker process: both node machines over one replica, one sender and one receiver."""
