"""A live demo behind the boards: made-up facts -> real sidecars -> real Prometheus -> pictures, or a test's queries."""
