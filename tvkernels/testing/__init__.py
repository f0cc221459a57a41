"""What tests and benchmarks share: op specifications, seeded inputs, error budgets."""
