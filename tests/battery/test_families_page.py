"""The page of families names what there is; its figures are written by the battery (`--families-page`)."""

from battery.families_page import PAGE, families, row


def test_the_page_names_every_family_and_head() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for name, group in families().items():
        expected = row(name, group, None).rstrip("|").rstrip()
        assert any(line.startswith(expected) for line in lines), f"{name}: run pytest tests/battery --families-page"


def test_the_page_names_nothing_else_and_every_export_is_right() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "`" in line]
    assert len(lines) == len(families())
    assert all(line.endswith("bit for bit |") for line in lines)
