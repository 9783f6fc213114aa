"""What makes hf_paged faster and could be left out: each by a name, on unless switched off or out of order.

`HF_PAGED_DISABLE=name,...` in the environment switches tricks off, for comparisons and to find out what is at fault.
"""

import logging
import os
from functools import cached_property

from hf_paged._torch.private import MissingNameError, Private

logger = logging.getLogger(__name__)

SWITCH = "HF_PAGED_DISABLE"

TRICKS: dict[str, "Trick"] = {}
"""All of them, by name."""


class Trick:
    """Something that results don't depend on, or that is refused without.

    Args:
        name: for `HF_PAGED_DISABLE`; identifier.
        what: what it does, as in "replays the loops of a kernel".
        without: what happens where it is off, as in "each layer calls inductor's wrapper".
        needs: private names of torch, all of which it takes.
        can_be_switched_off: not what only refuses.
        device_type: `"cpu"` or `"cuda"`, where it makes a difference; None: anywhere.
    """

    def __init__(
        self,
        name: str,
        what: str,
        without: str,
        *needs: Private,
        can_be_switched_off: bool = True,
        device_type: str | None = None,
    ) -> None:
        self.name = name
        self.device_type = device_type
        self.what = what
        self.without = without
        self.can_be_switched_off = can_be_switched_off
        self._needs = needs
        self._failure: str | None = None
        assert name not in TRICKS
        TRICKS[name] = self

    @property
    def is_on(self) -> bool:
        """Whether to do it; looks up what it needs the first time, and says in one log message if that is missing."""
        return self._is_able and self._failure is None

    def fall_back(self, error: BaseException | str) -> None:
        """Do without from now on, since something went wrong; says so in one log message."""
        if self._failure is None:
            self._failure = " ".join(str(error).split())[:300]
            logger.warning("hf_paged goes on without %s: %s. So %s.", self.name, self._failure, self.without)

    def status(self) -> str:
        """`"on"`, or by whom it is off, or why something else is done."""
        if self.name in _switched_off():
            return f"off ({SWITCH})"
        return "on" if self.is_on else f"fell back: {self._failure}; {self.without}"

    @cached_property
    def _is_able(self) -> bool:
        if self.name in _switched_off():
            return False
        try:
            for name in self._needs:
                _ = name.value
        except MissingNameError as error:
            self.fall_back(error)
        return True


def check_switches() -> None:
    """Refuse names that no trick has.

    Raises:
        ValueError: if there is one in `HF_PAGED_DISABLE`.
    """
    known = {name for name, trick in TRICKS.items() if trick.can_be_switched_off}
    unknown = sorted(_switched_off() - known)
    if unknown:
        raise ValueError(
            f"{SWITCH} names {', '.join(unknown)}, but what can be switched off is {', '.join(sorted(known))}. "
            "Correct it in the environment, or unset it."
        )


def _switched_off() -> set[str]:
    return {name.strip() for name in os.environ.get(SWITCH, "").split(",")} - {""}
