"""Orders in which classes are learnt, beside the random one: named ones, and those that users write."""

from utils.errors import UserError

#: The order of iCaRL's experiments (Rebuffi et al. 2017), as the loaders that the 2020 code derives from list it.
ICARL = [
    87, 0, 52, 58, 44, 91, 68, 97, 51, 15, 94, 92, 10, 72, 49, 78, 61, 14, 8, 86, 84, 96, 18, 24, 32, 45, 88, 11, 4, 67,
    69, 66, 77, 47, 79, 93, 29, 50, 57, 83, 17, 81, 41, 12, 37, 59, 25, 20, 80, 73, 1, 28, 6, 46, 62, 82, 53, 9, 31, 75,
    38, 63, 33, 74, 27, 22, 36, 3, 16, 21, 60, 19, 70, 90, 89, 43, 5, 42, 65, 76, 40, 30, 23, 85, 2, 95, 56, 48, 71, 64,
    98, 13, 99, 7, 34, 55, 54, 26, 35, 39,
]  # fmt: skip

#: The superclass of each class, by CIFAR-100's own numbers (Krizhevsky 2009).
SUPERCLASS = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
    6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
    5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
    10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
    16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]  # fmt: skip

CIFAR100 = {"old": ICARL, "super": sorted(range(100), key=lambda c: (SUPERCLASS[c], c))}
TINYIMAGENET = {"old": list(range(200))}


def read(path: str, classes: int) -> list[int]:
    """The order in a user's file: the numbers 0 to classes - 1, each once, apart by spaces, commas or line ends.

    UserError if there is no such file, or something else in it.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            words = file.read(1_000_000).replace(",", " ").split()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--class_order {path} is no name of an order and cannot be read as a file ({error}): give random, chrono,"
            f" or a file of the {classes} classes' numbers."
        ) from None
    if len(words) != classes:
        raise UserError(
            f"--class_order {path} has {len(words)} entries, and there are {classes} classes: give each of the numbers"
            f" 0 to {classes - 1} once."
        )
    known = {str(c): c for c in range(classes)}
    wrong = next((w for i, w in enumerate(words) if w not in known or w in words[:i]), None)
    if wrong is not None:
        raise UserError(
            f"--class_order {path} has {wrong[:20]!r}, which is no class or stands there twice: give each of the"
            f" numbers 0 to {classes - 1} once."
        )
    return [known[w] for w in words]
