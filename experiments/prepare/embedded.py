"""Makes the archive of the embedded corpus, from a library of CPython 3.11.7.

    python3.11 -m experiments.prepare.embedded nl_jax/data/embedded/corpus.zip

The archive that travels with the package was made so. Its names and texts are
the corpus; another one is another corpus, whose figures are not comparable.
"""

import io
import pathlib
import sys
import sysconfig
import zipfile
from collections.abc import Iterable

from nl_jax.data import sources

_SKIPPED = {"test", "tests"}


def pack(library: pathlib.Path, packages: Iterable[str]) -> bytes:
  """A zip archive of the Python sources of packages, tests excepted.

  Args:
    library: the folder of the packages.
    packages: names of its folders.

  Returns:
    The archive, the same for the same files and the same zlib.
  """
  names = sorted(
    path.relative_to(library).as_posix()
    for package in packages
    for path in (library / package).rglob("*.py")
    if not _SKIPPED & set(path.relative_to(library).parts)
  )
  made = io.BytesIO()
  with zipfile.ZipFile(made, "w") as archive:
    for name in names:
      about = zipfile.ZipInfo(name)  # Of 1980, and of no owner.
      archive.writestr(
        about, (library / name).read_bytes(), zipfile.ZIP_DEFLATED, 9
      )
  return made.getvalue()


def main() -> None:
  """Writes the file of the command line."""
  library = pathlib.Path(sysconfig.get_path("stdlib"))
  content = pack(library, sources.EMBEDDED_PACKAGES)
  pathlib.Path(sys.argv[1]).write_bytes(content)


if __name__ == "__main__":
  main()
