"""In: what happened in a run. Out: facts, complete statements for operators, in the scope queues."""
