"""What all tests share."""

from tests.machines import this_machine


def pytest_report_header() -> str:
    """The machine, because vector extensions and threads change the last digits of results."""
    return f"cpu: {this_machine()}"
