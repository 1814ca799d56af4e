"""Counts of what was used and what was skipped, and why."""

from operator import itemgetter


class Tally:
    """Counts what was used and what was skipped, and keeps the first ids of every reason."""

    EXAMPLES = 20

    def __init__(self):
        self.kept = 0
        self.skipped: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def keep(self) -> None:
        """Count one sample that is used."""
        self.kept += 1

    def skip(self, reason: str, id: str) -> None:
        """Count one sample that is not."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.EXAMPLES:
            examples.append(id if id.isprintable() else ascii(id))

    def __str__(self) -> str:
        skipped = sum(self.skipped.values())
        lines = [f"{self.kept + skipped:,} samples: {self.kept:,} kept, {skipped:,} skipped"]
        for reason, count in sorted(self.skipped.items(), key=itemgetter(1), reverse=True):
            examples = self.examples[reason]
            names = ", ".join(examples)
            if count > len(examples):
                names += f", and {count - len(examples):,} more"
            lines.append(f"  {reason}: {count:,} ({names})")
        return "\n".join(lines)
