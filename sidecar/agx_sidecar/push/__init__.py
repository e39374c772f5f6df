"""Pushes metrics over OTLP. In: the series of this replica and, on the leader, of the fleet. Out: the collector."""
