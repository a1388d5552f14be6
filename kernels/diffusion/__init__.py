"""Flow matching: schedule, samplers, guidance."""
