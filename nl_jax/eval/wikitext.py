"""WikiText-2: pages, the detokeniser, and what its counts are of.

The replacements and their order are lm-evaluation-harness 0.4.13's, and so are
the counts: of the page as it stands in the file, not of the detokenised one.
"""

import re
from collections.abc import Iterable, Iterator

_PLAIN, _PATTERN = "plain", "pattern"
# Kind, what is found, what it becomes; the order matters.
_REPLACEMENTS = (
  (_PLAIN, "s '", "s'"),
  # A slip of the original: it asks for slashes, and so never fires.
  (_PATTERN, r"/' [0-9]/", "/'[0-9]/"),
  (_PLAIN, " @-@ ", "-"),
  (_PLAIN, " @,@ ", ","),
  (_PLAIN, " @.@ ", "."),
  (_PLAIN, " : ", ": "),
  (_PLAIN, " ; ", "; "),
  (_PLAIN, " . ", ". "),
  (_PLAIN, " ! ", "! "),
  (_PLAIN, " ? ", "? "),
  (_PLAIN, " , ", ", "),
  (_PATTERN, r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
  (_PATTERN, r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
  (_PATTERN, r"{\s*([^}]*?)\s*}", r"{\1}"),
  (_PATTERN, r'"\s*([^"]*?)\s*"', r'"\1"'),
  (_PATTERN, r"'\s*([^']*?)\s*'", r"'\1'"),
  (_PLAIN, "= = = =", "===="),
  (_PLAIN, "= = =", "==="),
  (_PLAIN, "= =", "=="),
  (_PLAIN, " \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
  (_PLAIN, " \n", "\n"),
  (_PLAIN, "\n ", "\n"),
  (_PLAIN, " N ", " 1 "),
  (_PLAIN, " 's", "'s"),
)


def detokenise(page: str) -> str:
  """The page as text, as the harness predicts it."""
  for kind, found, becomes in _REPLACEMENTS:
    if kind == _PLAIN:
      page = page.replace(found, becomes)
    else:
      page = re.sub(found, becomes, page)
  return page


def words(page: str) -> int:
  """Words of a page; empty strings at its two ends count, as in the harness."""
  return len(re.split(r"\s+", page))


def pages(text: str) -> Iterator[tuple[int, str]]:
  """(first line, page) of the raw file, split at the titles of pages.

  Args:
    text: of `wiki.test.raw`; lines are counted from 1.
  """
  start, page = 1, list[str]()
  for number, line in enumerate(text.split("\n"), 1):
    if _is_title(line):
      yield from _whole(start, page)
      start, page = number, []
    page.append(line)
  yield from _whole(start, page)


def _is_title(line: str) -> bool:
  """A heading of the first order: ` = Title = `."""
  marked = line.replace("= = =", "===").replace("= =", "==").strip()
  return marked.startswith("= ") and marked.endswith(" =")


def _whole(start: int, lines: Iterable[str]) -> Iterator[tuple[int, str]]:
  page = "\n".join(lines)
  if start > 1 or page.strip():
    yield start, page
