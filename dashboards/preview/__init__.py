"""A live demo after the boards: made-up facts -> real sidecars -> real Prometheus -> pictures, or a test's queries."""
