"""Statistics, result rows, tables, figures and report.html, from what runs left on disk."""
