"""Things to look at: charts as data, and the same charts as SVG, HTML and PNG."""
