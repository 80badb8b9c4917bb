"""Names of options stay on one line, such as `--sparsity 0.3`; loaded by mkdocs.yml."""

import re


OPTION = re.compile(r"<code>(--[^<]{1,30})</code>")


def on_page_content(html: str, **kwargs) -> str:
    return OPTION.sub(r'<code class="option">\1</code>', html)
