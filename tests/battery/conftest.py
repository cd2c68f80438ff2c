"""The option that writes `docs/families.md`."""

import pytest

from battery import families_page


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-page", action="store_true", help="write docs/families.md from what this run measures")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not session.config.getoption("--families-page", default=False):
        return
    if left := families_page.unmeasured():
        raise pytest.UsageError(f"docs/families.md needs all of a family; not measured: {', '.join(left[:5])}")
    families_page.PAGE.write_text(families_page.page(), encoding="utf-8")
