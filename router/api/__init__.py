"""What the HTTP APIs share: how a path's body is read, and how generations become its answer."""
