"""How image tokens are drawn: schedules, guidance, the decode loop, and the pipeline around it."""
