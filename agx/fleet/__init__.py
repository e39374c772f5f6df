"""In: leases and scope queues. Out: the live runs and the newest facts of a whole fleet."""
