"""Parts of the report: results.py reads, picture.py draws, page.py writes HTML."""
