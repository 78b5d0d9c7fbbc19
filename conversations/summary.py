"""What became of the records of a source: how many were read and used, and why the others were not."""

from common.errors import BadInput


class Summary:
    """Counts, of one source of conversations. Records are numbered from 1, as a person counts."""

    def __init__(self, name: str, read: int = 0):
        self.name, self.read = name, read
        self.skipped: dict[str, list[int]] = {}  # why -> how many records, and the first one's number
        self.dropped: dict[str, int] = {}  # why -> how many turns
        self.notes: dict[str, int] = {}

    def skip(self, problem: str, record: int):
        count = self.skipped.setdefault(problem, [0, record])
        count[0] += 1
        count[1] = min(count[1], record)

    def drop(self, reason: str, count: int = 1):
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def note(self, text: str, count: int):
        self.notes[text] = self.notes.get(text, 0) + count

    @property
    def used(self) -> int:
        return self.read - sum(count for count, _ in self.skipped.values())

    @property
    def counts(self) -> dict:
        """As JSON can hold them, for `add`."""
        return {"read": self.read, "skipped": self.skipped, "dropped": self.dropped, "notes": self.notes}

    def add(self, counts: dict):
        """Adds the `counts` of another summary of the same source."""
        self.read += counts["read"]
        for problem, (count, first) in counts["skipped"].items():
            have = self.skipped.setdefault(problem, [0, first])
            self.skipped[problem] = [have[0] + count, min(have[1], first)]
        for reason, count in counts["dropped"].items():
            self.drop(reason, count)
        for text, count in counts["notes"].items():
            self.note(text, count)

    def table(self) -> str:
        """Plain text that is also Markdown."""
        rows = [(self.name, "", ""), ("records read", self.read, ""), ("records used", self.used, "")]
        kinds = self.largest()
        rows += [(f"skipped: {why}", count, f"first: record {first}") for why, (count, first) in kinds.items()]
        rows += [(f"turns left out: {why}", count, "") for why, count in self.dropped.items()]
        rows += [(text, count, "") for text, count in self.notes.items()]
        texts = [
            (text.replace("\n", " ").replace("|", "\\|"), f"{count:,}" if count != "" else "", where)
            for text, count, where in rows
        ]
        wide, high, far = (max(3, *(len(row[i]) for row in texts)) for i in range(3))
        lines = [f"| {text:{wide}} | {count:>{high}} | {where:{far}} |" for text, count, where in texts]
        lines.insert(1, f"| {'-' * wide} | {'-' * (high - 1)}: | {'-' * far} |")
        return "\n".join(lines)

    def largest(self) -> dict[str, list[int]]:
        """The kinds of skipped records, or the ten largest and all others as one: a kind may hold a record's words."""
        kinds = sorted(self.skipped.items(), key=lambda kind: -kind[1][0])
        if len(kinds) <= 11:
            return self.skipped
        rest = [numbers for _, numbers in kinds[10:]]
        return dict(kinds[:10]) | {f"{len(rest)} other reasons": [sum(n for n, _ in rest), min(n for _, n in rest)]}

    def check(self):
        """Raises BadInput, with all reasons, if no record is left."""
        if self.used <= 0:
            reasons = "; ".join(f"{problem} (record {first})" for problem, (_, first) in self.largest().items())
            raise BadInput(f"{self.name} holds no usable conversation: {reasons or 'it has no records'}")
