"""Programs that show the store at work; `python -m kvstore.demo` runs them.

Each scene is a module of its own without any output (digits.py); report.py has the table and the
plot, __main__.py the command line. They need the packages of the `demo` extra.
"""
