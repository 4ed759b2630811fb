"""The `velocity` command, one module per group of subcommands."""
