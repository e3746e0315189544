"""A run's configuration: fields, rules, and every problem in one line."""
