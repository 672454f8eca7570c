"""Reports: what run folders say about their runs, as figures, as JSON or Markdown, and as one HTML page.

The data flows one way: `read_run` reads a folder, `report_on` makes every figure of it, and `html_page`,
`markdown_page` or `msgspec` write reports down. Nothing here changes a run folder.
"""

from seer_async.report import mark
from seer_async.report.markdown import markdown_page
from seer_async.report.page import html_page
from seer_async.report.report import Report, report_on
from seer_async.report.run import Run, read_run

__all__ = ["Report", "Run", "html_page", "mark", "markdown_page", "read_run", "report_on"]
