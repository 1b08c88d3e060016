"""HTML pages about runs. They need no torch, so that a laptop without it can write them."""

from fastlab.report.charts import make_plots
from fastlab.report.page import augmented_text, render, write_report, write_whole
from fastlab.report.texts import MISSING, duration_text, flat_rows, number_text, percent_text

__all__ = [
    "MISSING",
    "augmented_text",
    "duration_text",
    "flat_rows",
    "make_plots",
    "number_text",
    "percent_text",
    "render",
    "write_report",
    "write_whole",
]
