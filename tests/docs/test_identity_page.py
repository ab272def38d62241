"""docs/concepts/identity.md shows the committed results, and every cell is identical."""

from __future__ import annotations

from tests.identity import command, record, report


def test_the_page_shows_the_committed_results() -> None:
    page = command.PAGE.read_text()
    assert page.count("<!-- report") == 4
    assert page == report.fill(page, command.tables())


def test_every_committed_cell_is_identical() -> None:
    results = record.committed()
    assert len(results) > 100
    assert report.failures(results) == []
