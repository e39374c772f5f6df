"""Recovery of lost runs. In: a dead run's stream and queued facts. Out: the entries and facts that finalize it."""
