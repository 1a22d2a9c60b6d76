"""Pages and tables made from the files of runs. Nothing here imports torch or the engine: a report can be written on any
machine that holds the folder.

- :func:`unmask.reports.report.report`: one run as one self-contained HTML file.
- :func:`unmask.reports.comparison.compare`: several runs side by side; ``runs_table`` lists the runs under a folder.
- :func:`unmask.reports.figures.claim_figure`: the picture of a claim.
- :func:`unmask.reports.tables.systems_table`: the table of systems in README and docs.
"""
