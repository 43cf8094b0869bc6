"""Which task is this: one gradient, and the rules around it.

Read `one_shot`, then `schedule` (many decisions, on each platform), `search` (the other rules) and
`evaluation`. A new rule is a function for `Decisions` under `schedule.compiled`, as in `search`,
and an entry of `search.Rule`.
"""
