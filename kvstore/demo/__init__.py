"""Programs that show the store at work; `python -m kvstore.demo` runs them.

Each scene is a module of its own without any output (digits.py, words.py); report.py has the tables
and the plot, scenes.py shows and judges, __main__.py is the command line. They need the packages of
the `demo` extra.
"""
