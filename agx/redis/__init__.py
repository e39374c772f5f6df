"""In: a redis-py client. Out: keys, commands with their replies, the server's time. Only this package connects."""
