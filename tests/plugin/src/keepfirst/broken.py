"""A plug-in that fails to import: it must be named, and the others must go on."""

import a_package_that_nobody_has  # noqa: F401
