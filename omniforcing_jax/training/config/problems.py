"""Problems of a config, collected so that all are reported at once."""

from collections.abc import Callable
from typing import Any


class ConfigError(ValueError):
    """Everything that is wrong with a config, one problem a line."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"  - {problem}" for problem in problems))
        self.problems = problems


class Problems(list):
    """Problems found so far."""

    def attempt(self, what: str, build: Callable[[], Any]) -> Any:
        """What `build` returns, or None after its error has been noted."""
        try:
            return build()
        except KeyError as error:
            self.append(f"{what}: has no {error}")
        except (ValueError, OSError, TypeError, AttributeError, OverflowError) as error:
            self.append(f"{what}: {error}")
        return None

    def free(self, *groups: str) -> bool:
        """Whether nothing has been found about these groups of settings."""
        return not any(problem.startswith(groups) for problem in self)
