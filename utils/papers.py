"""Published results and the settings that should give them, read from papers/*.toml."""

import dataclasses
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "papers"


@dataclasses.dataclass(frozen=True)
class Row:
    """One experiment of a paper.

    file: where it is written. settings: option name -> value. published: metric -> (mean, standard deviation),
    fractions. program: metric -> what the published program itself gave on such a stream, one value per seed. variant:
    empty for the settings that apply when only --model and --dataset are given; else what sets the row apart.
    """

    file: str
    model: str
    dataset: str
    settings: dict
    seeds: tuple[int, ...]
    published: dict
    program: dict = dataclasses.field(default_factory=dict)
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.model, self.dataset, self.variant) if part)


def rows() -> list[Row]:
    """Every row of every paper, in the order of the files."""
    return [row for path in sorted(FOLDER.glob("*.toml")) for row in read(path)]


def read(path: Path) -> list[Row]:
    """The rows of one file; [common] settings apply to all of them."""
    content = tomllib.loads(path.read_text())
    common = content["common"]
    return [
        Row(
            file=f"papers/{path.name}",
            model=row["model"],
            dataset=row["dataset"],
            settings={**common["settings"], **row["settings"]},
            seeds=tuple(row.get("seeds", common["seeds"])),
            published={metric: tuple(value) for metric, value in row.get("published", {}).items()},
            program={metric: tuple(values) for metric, values in row.get("program", {}).items()},
            variant=row.get("variant", ""),
        )
        for row in content["row"]
    ]


def default_row(model: str, dataset: str, n_epochs: int | None = None) -> Row | None:
    """The row whose settings are the defaults of this pair, if there is one.

    n_epochs: as asked for, if it was; the row "multipass", if there is one, applies where it is more than 1.
    """
    found = {row.variant: row for row in rows() if (row.model, row.dataset) == (model, dataset)}
    if n_epochs is not None and n_epochs > 1 and "multipass" in found:
        return found["multipass"]
    return found.get("")
