"""In: nothing. Out: a Valkey server and child processes that end with this process; for the demo and for tests."""
