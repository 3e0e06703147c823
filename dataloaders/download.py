"""Fetching files from the data sets' own homes."""

import http.client
import urllib.request
from collections.abc import Callable

from utils.errors import UserError


def download(file: str, homes, largest: int, check: Callable[[bytes], object]) -> bytes:
    """The file's content from the first of the homes (URLs that end in /) that gives a sound one.

    largest: bytes that are read at most. check: raises ValueError for content that is not sound. UserError if no home
    has it.
    """
    failures = []
    for home in homes:
        try:
            with urllib.request.urlopen(f"{home}{file}", timeout=30) as response:
                content = response.read(largest)
            check(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{home}: {error or type(error).__name__}")
        else:
            return content
    raise UserError(f"{file} could not be downloaded ({'; '.join(failures)}): bring it and give --source FOLDER.")
