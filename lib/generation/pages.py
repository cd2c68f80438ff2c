"""Which pages of a pool are whose: counted, shared by what they hold, and given away again when they are needed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class PagePool:
    """Pages 0 to `size` - 1, on the host; what is in them is the device's business.

    A page whose content is known is lent to every text that begins with the same tokens. One that nobody uses keeps its
    content until there is no other page left; the one that was used least recently is then given away first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._blank = list(range(size - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # unused pages of known content, the oldest first
        self._users = [0] * size
        self._page_of: dict[bytes, int] = {}
        self._content_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that nobody uses."""
        return len(self._blank) + len(self._idle)

    @property
    def shared(self) -> int:
        """Pages that are saved at the moment: of every page all uses but one."""
        return sum(n - 1 for n in self._users if n > 1)

    def take(self) -> int | None:
        """A page for something new; None if all are in use."""
        if self._blank:
            page = self._blank.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._content_of.pop(page)]
        else:
            return None
        self._users[page] = 1
        return page

    def share(self, content: bytes) -> int | None:
        """The page with this content, used once more; None if there is none."""
        page = self._page_of.get(content)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] += 1
        return page

    def know(self, page: int, content: bytes) -> None:
        """Says what is in a page, which no longer changes. Of two with the same content the first is lent."""
        if content not in self._page_of and page not in self._content_of:
            self._page_of[content], self._content_of[page] = page, content

    def release(self, pages: Sequence[int]) -> None:
        """Uses these pages once less. The last of a text is given away before its first, which others share sooner."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._content_of:
                self._idle[page] = None
            else:
                self._blank.append(page)


def content_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """What a page holds: its tokens, and all before them, since keys and values depend on those too."""
    return hashlib.blake2b(before + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()
