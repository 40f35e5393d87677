"""The command line: one module per subcommand, each with ``add_parser(subparsers)`` and ``run(args) -> int``.

Modules are imported when their command is asked for; what they print goes to stdout, what went wrong to stderr.
"""
