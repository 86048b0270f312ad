"""Text in, rows of tokens out: what the three stages' data modules share."""

import engine  # noqa: F401  before the libraries: it makes their imports faster
