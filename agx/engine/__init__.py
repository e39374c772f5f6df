"""In: the configuration. Out: what one event loop owns: connections, group commit, leases, hub."""
