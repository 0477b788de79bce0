"""The process around an engine: readiness, sessions, the direct route, drain. Free of torch."""
