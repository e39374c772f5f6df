"""In: a run's messages. Out: conversations, stored in Redis or in a SQL database."""
