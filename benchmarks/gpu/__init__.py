"""One day with a GPU: the plan of its steps, a deadline, and what each step does."""
