"""Parts of the pages that ``benchmarks.report`` renders, a module for each family of tables.

A section is a module here with

- ``markdown(results) -> list[str]``: paragraphs and tables from the results (file stem -> content;
  a ``.jsonl`` is a list), ``[]`` where its files are missing (what is computed has none);
- ``figures(results) -> {file name: draw}``, optional: ``draw(path)`` saves a PNG or SVG there. Read
  every result before returning; a picture that ``markdown`` does not show comes after its text;
- ``summary(results) -> list[str]``, optional: what of it the README shows;
- ``PAGE``: ``"benchmarks"`` (the default), ``"study"`` or ``"how-it-works"``; ``TITLE``: its
  heading, by default the first line of its docstring; ``ORDER``: smaller comes first, 50 by
  default, then by name.

A module without ``markdown``, such as ``common``, is no section. One that a section draws with is
named after it (``memory_figures``): a change of it makes the section's figures stale.
"""
