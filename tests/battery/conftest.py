"""The option that writes `docs/families.md`."""

import pytest

from battery import families_page
from battery.goldens import goldens


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-page", action="store_true", help="write docs/families.md from what this run measures")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not session.config.getoption("--families-page", default=False):
        return
    measured = {name for found in families_page.MEASURES.values() for name in found.parity}
    print(int(exitstatus), len(measured), len(goldens()), sorted({str(g) for g in goldens()} ^ measured)[:5])
    if exitstatus != 0 or measured != {str(golden) for golden in goldens()}:
        raise pytest.UsageError("docs/families.md is written after a whole run of the battery in which nothing failed")
    families_page.PAGE.write_text(families_page.page(), encoding="utf-8")
