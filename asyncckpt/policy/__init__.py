"""When to save, what to keep, which way to copy: pure functions over records."""
