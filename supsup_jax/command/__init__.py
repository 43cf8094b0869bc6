"""The subcommands of `supsup`, by what they do to a store: look at it, change it, ask it."""
