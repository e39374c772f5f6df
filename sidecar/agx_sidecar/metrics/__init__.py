"""In: facts. Out: the fleet's metrics, counted by one leader and exported at /metrics."""
