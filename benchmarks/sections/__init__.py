"""Parts of the report: each turns result files into paragraphs of Markdown and into figures."""
