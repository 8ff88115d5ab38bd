"""The report of benchmarks.gpu: gpu.json and gpu.md in one folder, both written anew after every result."""

import json
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown
from training.files import json_files, write_whole


class Report:
    """What is known so far. One process at a time adds to it: each begins with what the ones before have written.

    Attributes:
        head: where, when and with what it was measured.
        parts: by title, each with its ``tables``, a ``note`` of what went wrong, and the seconds that it took.
    """

    def __init__(self, folder: Path):
        self.data, self.page = folder / "gpu.json", folder / "gpu.md"
        self.read()

    def read(self) -> None:
        found = json.loads(self.data.read_text(encoding="utf-8")) if self.data.exists() else {}
        self.head: dict[str, str] = found.get("head", {})
        self.parts: dict[str, dict[str, Any]] = found.get("parts", {})

    def add(self, part: str, table: dict | None = None, **more: Any) -> None:
        """Adds a table to a part, in the place of one with the same title, and whatever else is known of the part."""
        entry = self.parts.setdefault(part, {"tables": []})
        if table is not None:
            others = [other for other in entry["tables"] if other["title"] != table["title"]]
            entry["tables"] = [*others, table]
        entry.update(more)
        self.write()

    def write(self) -> None:
        json_files.write(self.data, {"head": self.head, "parts": self.parts})
        lines = [
            f"# {self.head.get('card', 'No card')}",
            "",
            *(f"- {key}: {value}" for key, value in self.head.items()),
        ]
        for title, entry in self.parts.items():
            seconds = f" ({entry['seconds']:.0f} s)" if "seconds" in entry else ""
            lines += ["", f"## {title}{seconds}"]
            lines += ["", entry["note"]] if entry.get("note") else []
            lines += [markdown(table) for table in entry["tables"]]
        write_whole(self.page, "\n".join(lines) + "\n")

    def number(self, part: str, row: str, column: str) -> float | None:
        """A cell of a part's tables; None where it is missing or no number."""
        for table in self.parts.get(part, {"tables": []})["tables"]:
            for name, *cells in table["rows"]:
                if name == row and column in table["head"]:
                    try:
                        return float(cells[table["head"].index(column) - 1].replace(",", ""))
                    except ValueError:
                        return None
        return None
