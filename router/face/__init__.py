"""The router's two faces, HTTP and gRPC: listeners, API keys, limits of bodies, routes and errors."""
