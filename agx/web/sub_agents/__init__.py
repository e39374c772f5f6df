"""In: a replay's events of sub-agents. Out: the same in the chat protocols; for pages that show what a tool does."""
