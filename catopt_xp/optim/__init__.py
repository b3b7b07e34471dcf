"""Update rules, what all rules share, learning-rate schedules and moving averages."""
