"""What operators see of sequences: the last ones that ended, the status page, and OpenTelemetry spans."""
