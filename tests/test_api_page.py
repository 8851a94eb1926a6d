"""``docs/api.md`` matches the current docstrings."""

from __future__ import annotations

import api_page

import ca2vdm_cli


def test_the_page_is_up_to_date() -> None:
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.render(), "run: python tests/api_page.py"


def test_every_public_name_is_described() -> None:
    text = api_page.render()
    for name in ca2vdm_cli.__all__:
        assert f"\n### `{name}`\n" in text
        _, docstring = api_page.definitions(ca2vdm_cli._HOME.get(name, "__init__"))[name]
        assert docstring, f"{name} has no docstring"


def test_docstrings_become_markdown() -> None:
    text = api_page.markdown("""Does ``this``.

    x = 1

Args:
    one: the first,
        on two lines.
    two, three: others.

Returns:
    A number.
""")
    expected = """
Does `this`.

```python
    x = 1
```

Args:

- `one`: the first, on two lines.
- `two, three`: others.

Returns:

- A number."""
    assert text == expected
