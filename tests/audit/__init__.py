"""The audit: what a real Prometheus stored through kills and pauses of the leader, against what really happened."""
