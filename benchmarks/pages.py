"""Pages of the documentation that scripts write, and that a test compares with their scripts."""


def write(files):
    """Write the texts of pages, by their paths."""
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
